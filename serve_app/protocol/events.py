"""Events of a request. The engine's thread makes them, and any thread may read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from serve_app.errors import DiffusionServeError, NotFinite
from serve_app.protocol.inpainting import with_kept_part
from serve_app.protocol.params import GenerationParams
from serve_app.protocol.safety import SafetyVerdict

if TYPE_CHECKING:  # the gateway reads some of these events without torch
    from torch import Tensor


@dataclass(frozen=True)
class Queued:
    """The request is admitted and waits. Sent first, and again for each `Engine.locate`."""

    position: int
    """Number of requests that wait before this one."""
    eta_s: float
    """Predicted seconds until the image is done; 0 while the model's speed is unknown."""
    replica: str = ""
    """Replica of the engine, in a served application."""
    number: int = 0
    """Number of this request in its engine, in a served application."""


@dataclass(frozen=True)
class Progress:
    """A denoising step is done. Also sent for each `Engine.locate` while the request runs."""

    step: int
    """Denoising steps that are done."""
    total_steps: int
    """Denoising steps that run in all."""
    eta_s: float | None = None
    """Predicted seconds until the image is done; only after `Engine.locate`."""


def to_host(pixels: Tensor) -> Image.Image:
    """Copy pixels from the device to an image in RGB with 8 bits."""
    # Without the clamp, a pixel just above 1 would become black.
    eight_bits = (pixels.float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(eight_bits.permute(1, 2, 0).cpu().numpy())


@dataclass(frozen=True)
class Preview:
    """A preview of the image, with one pixel for each cell of the latents."""

    step: int
    """Step after which it was made, counted from 1."""
    pixels: Tensor
    """Tensor of shape ``[3, height, width]``, sRGB in [0, 1] or NaN, on the device."""

    def image_for(self, params: GenerationParams) -> Image.Image:
        """Return it at the size of the image, with the part that the request's mask keeps.

        Copies the pixels from the device: do not call it on the engine's thread.
        """
        assert params.width is not None
        assert params.height is not None
        return with_kept_part(self.image.resize((params.width, params.height)), params)

    @cached_property
    def image(self) -> Image.Image:
        """The preview in RGB with 8 bits, on the host.

        The first access copies the pixels from the device: do not read it on the engine's thread.
        Raises `NotFinite` if a pixel is NaN.
        """
        pixels = self.pixels.cpu()
        if pixels.isnan().any():
            raise NotFinite(f"the preview of step {self.step} is not finite (NaN or infinite).")
        return to_host(pixels)


class GenerationTimings(NamedTuple):
    """Duration of each part of one image's generation, in seconds, in the order of the parts."""

    queue_s: float = 0.0
    """Time from the submission to the start."""
    encode_s: float = 0.0
    """Time from the start to the first denoiser call: encoding of prompt and input image."""
    denoise_s: float = 0.0
    """Time from the first to the end of the last denoiser call."""
    decode_s: float = 0.0
    """Time from the last denoiser call to the pixels. The device may still compute those of a
    `GenerationResult`; for an `EncodedImage` they are copied to the host."""


class DenoiserCalls(NamedTuple):
    """Denoiser calls of one image."""

    made: int = 0
    """Calls of the denoiser."""
    extrapolated: int = 0
    """Calls that were answered by extrapolation from earlier ones."""


GENERATION_PARTS = tuple(field.removesuffix("_s") for field in GenerationTimings._fields)
"""Names of the parts in metrics, logs and traces."""


@dataclass(frozen=True)
class GenerationResult:
    """A finished image."""

    params: GenerationParams
    """Parameters, with every default filled in."""
    pixels: Tensor
    """Tensor of shape ``[3, height, width]``, sRGB in [0, 1], on the device: the output of the
    pipeline. With a mask, only `image` has the kept part of the input image exactly."""
    warnings: tuple[str, ...]
    """Parts of the request without effect, such as the end of a prompt that is too long, and a
    note if the safety checker flagged the image."""
    prompt_tokens: int
    """Tokens of the prompt that the model read; 0 if its tokenizer is unknown."""
    timings: GenerationTimings
    """Duration of each part of the generation, in seconds."""
    calls: DenoiserCalls
    """Denoiser calls that were made, and those that were not."""
    ended_at: float
    """Time at the end of decoding, by ``time.perf_counter``. The device may still compute the
    pixels."""
    not_finite: Callable[[], NotFinite | None]
    """Wait for the device, and return the error if a pixel is NaN: then there is no image."""
    safety: SafetyVerdict | None = None
    """Verdict of the safety checker; ``None`` if nothing looked at the image."""

    @cached_property
    def image(self) -> Image.Image:
        """The image in RGB with 8 bits, on the host, with the part that the mask keeps.

        The first access copies the pixels from the device: do not read it on the engine's thread.
        Raises `NotFinite` if the model's output is NaN or infinite.
        """
        image = to_host(self.pixels)
        if (error := self.not_finite()) is not None:  # the device is done: no second wait
            raise error
        return with_kept_part(image, self.params)


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
    """The image is finished. This is the last event."""

    result: GenerationResult
    """The image."""


@dataclass(frozen=True)
class Failed:
    """The request failed, was rejected or was cancelled. This is the last event."""

    error: DiffusionServeError
    """The reason."""


Event = Queued | Progress | Preview | Timeline | Completed | Failed
