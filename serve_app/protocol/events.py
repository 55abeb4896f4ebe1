"""What a request reports on its way. The engine's thread makes them; any thread may read them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from serve_app.errors import DiffusionServeError
from serve_app.protocol.params import GenerationParams

if TYPE_CHECKING:  # the gateway reads some of these events, and has no torch
    from torch import Tensor


@dataclass(frozen=True)
class Queued:
    """It waits. The first event of a request, and again whenever somebody asks where it stands."""

    position: int
    """Requests that wait before it."""
    eta_s: float
    """Seconds until the picture should be done; 0 while nothing is known of the model."""
    replica: str = ""
    """Whose engine that is, where there are several. The engine does not know: who passes it on
    sets this and ``number``."""
    number: int = 0
    """The engine's, of this request."""


@dataclass(frozen=True)
class Progress:
    """A denoising step is done, or somebody asked where the request stands."""

    step: int
    """Steps that are done."""
    total_steps: int
    eta_s: float | None = None
    """Seconds until the picture should be done, for who asked."""


class _Pixels:
    """``pixels``, ``[3, height, width]``, sRGB in [0, 1], may still be on the device.

    ``image`` copies them off and is meant for the reader's thread, never for the engine's.
    """

    pixels: Tensor

    @cached_property
    def image(self) -> Image.Image:
        pixels = (self.pixels.float() * 255).round().byte()
        return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


@dataclass(frozen=True)
class Preview(_Pixels):
    """What the picture may become, one pixel for each cell of the latents."""

    step: int
    pixels: Tensor


@dataclass(frozen=True)
class GenerationResult(_Pixels):
    """A finished picture."""

    params: GenerationParams
    """With every default filled in."""
    pixels: Tensor
    warnings: tuple[str, ...]
    """What of the request has no effect, such as the end of a prompt that is too long."""
    prompt_tokens: int
    """That the model read of the prompt; 0 if its tokenizer is unknown."""
    queue_s: float
    """From its submission to its start."""
    encode_s: float
    """From there to its first denoiser call: the prompt, and the picture to start from."""
    denoise_s: float
    """From there to the end of its last denoiser call."""
    decode_s: float
    """From there to the finished pixels, which may still be on their way on the device."""
    ended_at: float
    """When that was, by `time.perf_counter`: whoever reads the pixels may wait for the device."""


class Step(NamedTuple):
    """One step that is done."""

    ended_s: float
    """When its last denoiser call was done, in seconds after its request came to the first one."""
    batch_size: int
    """Requests in that call."""


@dataclass(frozen=True)
class Timeline:
    """How far a request has come. Told of those that are traced: after each part, and at the end.

    On a GPU times are those at which the program went on, up to one denoiser call ahead of it.
    """

    parts_s: tuple[float, ...] = ()
    """How long each part took that has ended, of queue, encode, denoise and decode."""
    steps: tuple[Step, ...] = ()
    peers: tuple[str, ...] = ()
    """`RequestContext.trace` of others that shared its denoiser calls; of no more than `MAX_PEERS`."""
    age_s: float = 0.0
    """Since its submission, when this was passed on; set by who does so."""


MAX_PEERS = 32


@dataclass(frozen=True)
class Completed:
    """The last event of a request that was painted."""

    result: GenerationResult


@dataclass(frozen=True)
class Failed:
    """The last event of a request that was not, cancelled ones included."""

    error: DiffusionServeError


Event = Queued | Progress | Preview | Timeline | Completed | Failed
