"""Arguments that are as long as the prompt: find them, and change their length.

`learn` compares a call for one prompt with a call for that prompt and a longer one. Pure functions
of axes and tensors.
"""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from serve_app.engine.batching.axis import (
    Axis,
    Branch,
    Mask,
    NotMergeable,
    Rows,
    Shared,
    items,
    rebuild,
    tensors,
)


def learn(axis: Axis, name: Hashable, one: Any, both: Any) -> Axis:
    """Return ``axis`` with the dimensions that are as long as the prompt, and masks.

    Args:
        axis: Axis of ``one``, which `axis.compare` found.
        name: Name of the value, for messages.
        one: The value for one prompt.
        both: The value for that prompt and a longer one.

    Raises:
        NotMergeable: the value depends on the prompt in another way; the message has ``name``.
    """
    match axis:
        case Rows() if isinstance(one, Tensor):
            if len(both) != 2 * len(one):
                raise NotMergeable(f"{name} has {len(both)} rows for two prompts")
            dim = _varying_dim(name, [one[0], both[0]])
            return axis if dim is None else replace(axis, prompt_dim=1 + dim)
        case Rows():
            if len(both) != 2 * len(one):
                raise NotMergeable(f"{name} has {len(both)} items for two prompts")
            if _repeated(one, both):
                return axis
            if not all(isinstance(item, Tensor) for item in (*one, *both)):
                raise NotMergeable(f"{name} depends on the prompt")
            return replace(axis, prompt_dim=_varying_dim(name, [*one, *both]))
        case Shared():
            if one is None and isinstance(both, Tensor):
                return Mask(both.dtype)
            if not _equal(one, both) and not _repeated(one, both):
                raise NotMergeable(f"{name} depends on the prompt, and has no row for each image")
            return axis
        case Branch(children):
            if _repeated(one, both):  # one item for each prompt, not for each image
                return axis
            pairs = dict(items(both))
            if list(pairs) != [key for key, _ in children]:
                raise NotMergeable(f"{name} has other items for two prompts")
            return Branch(
                tuple(
                    (key, learn(child, key, item, pairs[key]))
                    for (key, child), (_, item) in zip(children, items(one), strict=True)
                )
            )
        case _:
            return axis


def _varying_dim(name: Hashable, values: Sequence[Tensor]) -> int | None:
    """Return the dimension in which the tensors differ, if any. Raises `NotMergeable`."""
    shapes = [value.shape for value in values]
    if len({len(shape) for shape in shapes}) > 1:
        raise NotMergeable(f"{name} has other dimensions for a longer prompt")
    varying = [dim for dim, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
    if len(varying) > 1:
        raise NotMergeable(f"{name} is as long as the prompt in several dimensions")
    return varying[0] if varying else None


def _repeated(one: Any, both: Any) -> bool:
    """Return True if ``both`` is ``one`` twice, and without tensors."""
    if not isinstance(one, list | tuple) or next(tensors((one, both)), None) is not None:
        return False
    return list(both) == [*one, *one]


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return torch.equal(one, two)
    return type(one) is type(two) and bool(one == two)


def vary(axis: Axis) -> bool:
    """Return True if calls may differ in the length of their prompts."""
    match axis:
        case Rows(_, prompt_dim):
            return prompt_dim is not None
        case Branch(children):
            return any(vary(child) for _, child in children)
        case _:
            return False


def resized(axis: Axis, value: Any, like: Any) -> Any:
    """Return ``value`` with the prompt lengths of ``like``: cut, or repeated from the start.

    It has the shapes of ``like`` and contents of ``value``, for comparisons: not a valid prompt.
    """
    match axis:
        case Rows(_, int(dim)):
            if isinstance(value, Tensor):
                return _resized(value, dim, like)
            pairs = zip(value, like, strict=True)
            return rebuild(value, [_resized(one, dim, other) for one, other in pairs])
        case Mask():
            return like
        case Branch(children):
            others = dict(items(like))
            changed = [
                resized(child, item, others[key])
                for (_, child), (key, item) in zip(children, items(value), strict=True)
            ]
            return rebuild(value, changed)
        case _:
            return value


def _resized(value: Tensor, dim: int, like: Tensor) -> Tensor:
    positions = torch.arange(like.shape[dim], device=value.device) % value.shape[dim]
    return value.index_select(dim, positions)
