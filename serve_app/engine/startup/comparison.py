"""Comparison of images and of outputs of networks. Pure functions of tensors."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from serve_app.engine.batching.axis import tensors

MAX_PSNR_DB = 200.0
"""Peak signal-to-noise ratio that stands for equal images."""


def largest_difference(separate: Sequence[Tensor], together: Sequence[Tensor]) -> float:
    """Return the largest difference over all pixels of all images; NaN if any pixel is NaN."""
    return float(
        torch.stack(
            [(a.float() - b.float()).abs().max() for a, b in zip(separate, together, strict=True)]
        ).max()
    )


def psnr_db(one: Tensor, two: Tensor) -> float:
    """Return the peak signal-to-noise ratio of two images in [0, 1], in decibels.

    It is `MAX_PSNR_DB` if they are equal.
    """
    error = float((one.double() - two.double()).square().mean())
    decibels = math.inf if error == 0 else -10 * math.log10(error)
    return MAX_PSNR_DB if decibels > MAX_PSNR_DB else decibels  # NaN stays


def relative_l2(one: Any, two: Any) -> float:
    """Return the L2 norm of ``one - two`` as a share of that of ``one``.

    Takes tensors, or lists and dicts of tensors. Returns infinity if their shapes differ, and NaN
    if they have NaN.
    """
    pairs = list(zip(tensors(one), tensors(two), strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return math.inf
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    norm = sum(float(a.double().square().sum()) for a, _ in pairs)
    if norm == 0:
        return math.inf if difference else 0.0
    return math.sqrt(difference / norm)


def is_constant(value: Any) -> bool:
    """Return True if every tensor in ``value`` has a single value, so that it proves nothing."""
    return all(bool((tensor == tensor.flatten()[0]).all()) for tensor in tensors(value))


def is_finite(value: Any) -> bool:
    """Return True if no tensor in ``value`` has NaN or infinity."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors(value))
