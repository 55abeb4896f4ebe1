"""What a request reports on its way. The engine's thread makes them; any thread may read them."""

from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from serve_app.engine.params import GenerationParams
from serve_app.errors import DiffusionServeError


@dataclass(frozen=True)
class Queued:
    """Accepted. ``position`` requests wait before it."""

    position: int
    eta_s: float
    """Seconds until the picture should be done; 0 while nothing is known of the model."""


@dataclass(frozen=True)
class Progress:
    """One denoising step is done."""

    step: int
    total_steps: int


class _Pixels:
    """``pixels``, ``[3, height, width]``, sRGB in [0, 1], may still be on the device.

    ``image`` copies them off and is meant for the reader's thread, never for the engine's.
    """

    pixels: Tensor

    @cached_property
    def image(self) -> Image.Image:
        pixels = (self.pixels.float() * 255).round().to(torch.uint8)
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
    queue_s: float
    denoise_s: float
    """From the start of the pipeline to its end: encoding, denoising and decoding."""


@dataclass(frozen=True)
class Completed:
    """The last event of a request that was painted."""

    result: GenerationResult


@dataclass(frozen=True)
class Failed:
    """The last event of a request that was not, cancelled ones included."""

    error: DiffusionServeError


Event = Queued | Progress | Preview | Completed | Failed
