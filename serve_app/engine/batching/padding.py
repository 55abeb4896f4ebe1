"""Padding of prompts, so that calls with prompts of different lengths may be merged.

Pure functions of tensors; this module knows no pipeline and no request.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHORTEST_BUCKET = 128
"""Length of the first bucket, in tokens: nearly all prompts that people type are shorter."""


def bucket_length(tokens: int) -> int:
    """Return the length of a prompt's bucket: a power of two, and at least `SHORTEST_BUCKET`.

    Only calls of one bucket are merged. So padding adds fewer than `SHORTEST_BUCKET` tokens to a
    row, or fewer than its prompt has.
    """
    return max(SHORTEST_BUCKET, 1 << (tokens - 1).bit_length())


@dataclass(frozen=True)
class Prompts:
    """Sizes of the prompts of some calls, which are merged."""

    rows: tuple[int, ...]
    """Number of batch rows of each call."""
    tokens: tuple[int, ...]
    """Length of each call's prompts."""
    device: torch.device
    length: int | None = None
    """Length to pad to; ``None`` for that of the longest prompt."""

    @property
    def padded(self) -> bool:
        """True if the network needs a mask to tell prompts from padding."""
        return self.length is not None or len(set(self.tokens)) > 1


def join(values: Sequence[Tensor], dim: int, length: int | None = None) -> Tensor:
    """Concatenate along the batch, with zeros after each value up to the longest in ``dim``.

    Pads to ``length`` if it is larger.
    """
    length = max(length or 0, *(value.shape[dim] for value in values))
    if all(value.shape[dim] == length for value in values):
        return torch.cat(list(values))
    shape = list(values[0].shape)
    shape[0], shape[dim] = sum(value.shape[0] for value in values), length
    joined = values[0].new_zeros(shape)
    parts = joined.split([value.shape[0] for value in values])
    for part, value in zip(parts, values, strict=True):
        part.narrow(dim, 0, value.shape[dim]).copy_(value)
    return joined


def join_masks(
    values: Sequence[Tensor | None], prompts: Prompts, dtype: torch.dtype
) -> Tensor | None:
    """Return the mask of merged calls, ``[rows, length]``: 1 for a token, 0 for padding.

    ``None`` stands for a call without padding, and is returned if the merged call has none either.
    """
    if not prompts.padded and all(value is None for value in values):
        return None
    masks = [
        torch.ones(rows, tokens, dtype=dtype, device=prompts.device) if value is None else value
        for value, rows, tokens in zip(values, prompts.rows, prompts.tokens, strict=True)
    ]
    return join(masks, 1, prompts.length)
