"""Events of a request. The engine's thread makes them, and any thread may read them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from serve_app.errors import DiffusionServeError
from serve_app.protocol.params import GenerationParams

if TYPE_CHECKING:  # the gateway reads some of these events without torch
    from torch import Tensor


@dataclass(frozen=True)
class Queued:
    """The request waits. This is the first event, sent again when the position is requested."""

    position: int
    """Requests that wait before this one."""
    eta_s: float
    """Seconds until the image should be done; 0 while the model's speed is unknown."""
    replica: str = ""
    """Replica of the engine. The deployment sets this and ``number``."""
    number: int = 0
    """Number of this request in its engine."""


@dataclass(frozen=True)
class Progress:
    """A denoising step is done, or the progress was requested."""

    step: int
    """Steps that are done."""
    total_steps: int
    eta_s: float | None = None
    """Seconds until the image should be done, if that was requested."""


class _Pixels:
    """An image as ``pixels``, ``[3, height, width]``, sRGB in [0, 1], may still be on the device.

    ``image`` copies them to the host. Read it on the reader's thread, never on the engine's.
    """

    pixels: Tensor

    @cached_property
    def image(self) -> Image.Image:
        pixels = (self.pixels.float() * 255).round().byte()
        return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


@dataclass(frozen=True)
class Preview(_Pixels):
    """A preview of the image, with one pixel for each cell of the latents."""

    step: int
    pixels: Tensor


class GenerationTimings(NamedTuple):
    """Duration of each part of one image's generation, in seconds, in the order of the parts."""

    queue_s: float = 0.0
    """Time from the submission to the start."""
    encode_s: float = 0.0
    """Time from there to the first denoiser call, to encode the prompt and the input image."""
    denoise_s: float = 0.0
    """Time from there to the end of the last denoiser call."""
    decode_s: float = 0.0
    """Time from there to the pixels. The device may still compute those of a `GenerationResult`;
    for an `EncodedImage` they are copied to the host."""


GENERATION_PARTS = tuple(field.removesuffix("_s") for field in GenerationTimings._fields)
"""Names of the parts in metrics, logs and traces."""


@dataclass(frozen=True)
class GenerationResult(_Pixels):
    """A finished image."""

    params: GenerationParams
    """Parameters, with every default filled in."""
    pixels: Tensor
    warnings: tuple[str, ...]
    """Parts of the request without effect, such as the end of a prompt that is too long."""
    prompt_tokens: int
    """Tokens of the prompt that the model read; 0 if its tokenizer is unknown."""
    timings: GenerationTimings
    ended_at: float
    """End of the decoding, by `time.perf_counter`. A reader of the pixels may wait for the
    device."""


class Step(NamedTuple):
    """One step that is done."""

    ended_s: float
    """End of its last denoiser call, in seconds after the request's first one began."""
    batch_size: int
    """Requests in that call."""


@dataclass(frozen=True)
class Timeline:
    """The progress of a traced request, sent after each part and at the end.

    On a GPU, times are those of the host, which is up to one denoiser call ahead of the device.
    """

    parts_s: tuple[float, ...] = ()
    """Durations of the parts that have ended, in the order of `GenerationTimings`."""
    steps: tuple[Step, ...] = ()
    peers: tuple[str, ...] = ()
    """`RequestContext.trace` of batch peers, at most `MAX_PEERS`."""
    age_s: float = 0.0
    """Seconds since the submission when this event was sent; set by the sender."""


MAX_PEERS = 32


@dataclass(frozen=True)
class Completed:
    """The last event of a request that was generated."""

    result: GenerationResult


@dataclass(frozen=True)
class Failed:
    """The last event of a request that failed or was cancelled."""

    error: DiffusionServeError


Event = Queued | Progress | Preview | Timeline | Completed | Failed
