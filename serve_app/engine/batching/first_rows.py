"""Batched arguments of which a network reads one row only: find them, and mark them in a spec.

Some networks take the positions of tokens from the first row. Merged calls with other positions,
such as those of an image in another shape, would get wrong outputs.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from serve_app.engine.batching.axis import (
    Axis,
    Branch,
    FirstRow,
    NotMergeable,
    Rows,
    items,
    rebuild,
)
from serve_app.engine.batching.batch import BatchSpec
from serve_app.engine.batching.rendezvous import Call

Path = tuple[Hashable, ...]
"""Place of a tensor in nested arguments."""

Differs = Callable[[Any, Any], bool]
"""Tells whether two outputs differ by more than rounding."""


def mark_first_rows(
    spec: BatchSpec, call: Call, other: Call, forward: Callable[[Call], Any], differs: Differs
) -> BatchSpec:
    """Return the spec with `FirstRow` for each argument that is not read row by row.

    Tries the arguments that are equal in both calls. The merges of different calls test the others.

    Args:
        call: a call for one image.
        other: the same call of another request, for an image of the same size.
        forward: runs the network.
    """
    single = spec.prepare(call)
    try:
        values_of_other = spec.prepare(other).values
    except NotMergeable:  # it has other arguments, so the two are never merged
        return spec
    others = dict(_tensors(spec.arguments, values_of_other))
    found: set[Path] = set()
    for path, tensor in _tensors(spec.arguments, single.values):
        if tensor.ndim < 2 or not _same(tensor, others.get(path)):
            continue
        changed = tensor.flip(1)
        if torch.equal(changed, tensor):
            continue
        values = _with(single.values, path, changed)
        alone = forward(replace(call, args=(), kwargs=values))
        merged = spec.merge([single, replace(single, values=values)])
        row = spec.split(forward(merged), [single, single])[1]
        if differs(alone, row):
            found.add(path)
    if not found:
        return spec
    arguments = _marked(spec.arguments, found)
    assert isinstance(arguments, Branch)
    return replace(spec, arguments=arguments)


def _same(one: Tensor, two: Tensor | None) -> bool:
    return two is not None and one.shape == two.shape and torch.equal(one, two)


def _tensors(axis: Axis, value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yield the batched tensors with their places."""
    match axis:
        case Rows() if isinstance(value, Tensor):
            yield path, value
        case Branch(children):
            for (key, child), (_, item) in zip(children, items(value), strict=True):
                yield from _tensors(child, item, (*path, key))


def _with(value: Any, path: Path, tensor: Tensor) -> Any:
    """Return a copy of nested arguments with another tensor at one place."""
    if not path:
        return tensor
    changed = [
        _with(item, path[1:], tensor) if key == path[0] else item for key, item in items(value)
    ]
    return rebuild(value, changed)


def _marked(axis: Axis, found: set[Path], path: Path = ()) -> Axis:
    match axis:
        case Rows(per_image, prompt_dim) if path in found:
            return FirstRow(per_image, prompt_dim)
        case Branch(children):
            return Branch(
                tuple((key, _marked(child, found, (*path, key))) for key, child in children)
            )
        case _:
            return axis
