"""The check that an image is finite: its pixels are neither NaN nor infinite.

Conversion to 8 bits turns NaN into black without an error, and clamping turns infinity into black
or white. So infinity becomes NaN where it leaves a network, and NaN survives up to the pixels. One
sum over them finds it, and the engine does not wait for its value.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from serve_app.engine.batching.axis import map_tensors
from serve_app.engine.batching.transfers import Reading
from serve_app.errors import NotFinite
from serve_app.protocol.params import GenerationParams


def mark_infinity(vae: nn.Module) -> None:
    """Turn infinity into NaN at both ends of every half of a VAE. Finite values are not changed.

    At the input too: the decoder of a tiny autoencoder begins with a limit for its latents. Wraps
    ``forward`` for good, so it is for a request's own copy.
    """
    for half in (getattr(vae, name, None) for name in ("encoder", "decoder")):
        if isinstance(half, nn.Module):
            half.forward = _marking(half.forward)


def _marking(forward: Callable[..., Any]) -> Callable[..., Any]:
    # Not a hook of torch: it keeps the tensors of a failed call, and has no fingerprint.
    @functools.wraps(forward)
    def marking(*args: Any, **kwargs: Any) -> Any:
        return marked(forward(*marked(args), **kwargs))

    return marking


def marked(values: Any) -> Any:
    """Return an argument or an output with NaN in place of infinity."""
    return map_tensors(_with_nan, values)


def _with_nan(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    nan = float("nan")
    return torch.nan_to_num(tensor, nan=nan, posinf=nan, neginf=nan)


class FiniteCheck:
    """The check of one image's pixels. It is begun at once, and any thread may read the result."""

    def __init__(self, pixels: Tensor, params: GenerationParams, dtype: torch.dtype) -> None:
        """Launch the check; ``dtype`` is the pipeline's, for the message."""
        self._params = params
        self._dtype = dtype
        self._sum = Reading(pixels.sum(dtype=torch.float32))

    def error(self) -> NotFinite | None:
        """Wait for the device; return the error if a pixel is NaN."""
        if math.isfinite(self._sum.value()):
            return None
        advice = []
        if self._dtype == torch.float16:
            advice.append(
                "float16 overflows above 65504, as in the VAE of SDXL: set model.dtype to bfloat16 "
                "or float32, or use a VAE that is made for float16."
            )
        if self._params.lora:
            names = ", ".join(repr(name) for name, _ in self._params.lora)
            advice.append(f"Try without the LoRA adapters: {names}.")
        advice.append("Try another noise_scheduler, and check the model's weights for NaN.")
        dtype = str(self._dtype).removeprefix("torch.")
        return NotFinite(
            f"the image is not finite (NaN or infinite), in {dtype}. {' '.join(advice)}"
        )


def require_finite(pixels: Tensor, params: GenerationParams, dtype: torch.dtype) -> None:
    """Wait for the device, and raise `NotFinite` if a pixel is NaN."""
    if (error := FiniteCheck(pixels, params, dtype).error()) is not None:
        raise error
