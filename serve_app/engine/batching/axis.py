"""The batch axis of arguments and outputs: find it, compare, merge and split along it.

An `Axis` describes one value of a denoiser call: where the batch is, or that there is none.
`compare` derives it from a call for one image and the same call for two images. Pure functions of
tensors; this module knows no pipeline and no request.
"""

import functools
import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

TIMESTEP_NAMES = ("timestep", "timesteps")
"""Arguments whose scalar is expanded to one value per row, so that rows may differ in it."""


class NotMergeable(Exception):
    """The call cannot be merged with any other call; it runs by itself."""


class NotWritable(Exception):
    """The axis has no form in JSON."""


@dataclass(frozen=True)
class Rows:
    """A tensor or list whose first dimension grows with the batch."""

    per_image: int
    """Length for one image in the learned call.

    Only ratios between arguments matter: without guidance every argument is half as long."""


@dataclass(frozen=True)
class Shared:
    """A value that does not grow with the batch; equal in all merged calls."""

    kind: type
    """Type of the value. Another type is rejected: a tensor in place of ``None`` may well carry
    the batch."""


@dataclass(frozen=True)
class PerRow:
    """A scalar timestep; one value per row in a merged call."""


@dataclass(frozen=True)
class Branch:
    """A list, tuple or dict, item by item."""

    children: tuple[tuple[Hashable, "Axis"], ...]


Axis = Rows | Shared | PerRow | Branch

_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (Tensor, NoneType, bool, int, float, str, torch.dtype, torch.device, torch.Size)
}
"""Types of shared values that JSON may name. A fixed list: a file must never import code."""


def to_json(axis: Axis) -> Any:
    """Return ``axis`` as JSON. Raises `NotWritable`."""
    match axis:
        case Rows(per_image):
            return {"rows": per_image}
        case PerRow():
            return {"per_row": True}
        case Shared(kind):
            if _KINDS.get(kind.__name__) is not kind:
                raise NotWritable(f"an argument is a {kind.__module__}.{kind.__qualname__}")
            return {"shared": kind.__name__}
        case Branch(children):
            if not all(type(key) in (str, int) for key, _ in children):
                raise NotWritable("the keys of an argument are neither names nor numbers")
            return {"branch": [[key, to_json(child)] for key, child in children]}


def from_json(value: Any) -> Axis:
    """Read the result of `to_json`.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: ``value`` is not such a result.
    """
    [(name, content)] = value.items()
    match name:
        case "rows":
            if not (isinstance(content, int) and content > 0):
                raise ValueError(f"{content!r} rows")
            return Rows(content)
        case "per_row":
            return PerRow()
        case "shared":
            return Shared(_KINDS[content])
        case "branch":
            return Branch(tuple((key, from_json(child)) for key, child in content))
        case _:
            raise ValueError(f"{name!r} is no axis")


def compare(name: Hashable, one: Any, two: Any) -> Axis:
    """Return the axis of a value that is ``one`` for one image and ``two`` for two images.

    Raises:
        NotMergeable: the two values fit no axis; the message contains ``name``.
    """
    if type(one) is not type(two):
        raise NotMergeable(f"{name} is {type(one).__name__} for one image, {type(two).__name__}")
    if name in TIMESTEP_NAMES and (
        isinstance(one, int | float) or (isinstance(one, Tensor) and one.ndim == 0)
    ):
        return PerRow()
    if isinstance(one, Tensor):
        if one.shape == two.shape:
            return Shared(Tensor)
        if one.ndim and two.shape == (2 * one.shape[0], *one.shape[1:]):
            return Rows(one.shape[0])
        raise NotMergeable(
            f"{name} has shape {list(one.shape)} for one image and {list(two.shape)} for two"
        )
    if isinstance(one, dict):
        if one.keys() != two.keys():
            raise NotMergeable(f"{name} has other keys for two images")
    elif isinstance(one, list | tuple):
        if one and len(two) == 2 * len(one):
            return Rows(len(one))
        if len(one) != len(two):
            raise NotMergeable(f"{name} has {len(one)} items for one image, {len(two)} for two")
    elif _equal(one, two):
        return Shared(type(one))
    else:
        raise NotMergeable(f"{name} is {one!r} for one image and {two!r} for two")
    pairs = zip(_items(one), _items(two), strict=True)
    return Branch(tuple((key, compare(key, a, b)) for (key, a), (_, b) in pairs))


def _equal(one: Any, two: Any) -> bool:
    try:
        return one is two or bool(one == two)
    except (TypeError, ValueError, RuntimeError):  # arrays and the like have no single answer
        return False


def _items(value: Any) -> list[tuple[Hashable, Any]]:
    return list(value.items() if isinstance(value, dict) else enumerate(value))


class Digests:
    """Digests of the contents of tensors, each computed once per tensor and version."""

    def __init__(self) -> None:
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def of(self, tensor: Tensor) -> bytes:
        """Return the digest; equal for equal contents. A new one copies the tensor to the CPU."""
        known = self._known.get(tensor)
        if known is None or known[0] != tensor._version:
            content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            known = (tensor._version, hashlib.blake2b(content.data, digest_size=16).digest())
            self._known[tensor] = known
        digest: bytes = known[1]
        return digest


def merge_key(axis: Axis, value: Any, lengths: list[Fraction], digests: Digests) -> Hashable:
    """Return a key that is equal for values that may be merged.

    Appends to ``lengths`` the length of each batched value, relative to that of one image.

    Raises:
        NotMergeable: ``value`` does not have the structure of ``axis``.
    """
    match axis:
        case Rows(per_image):
            if isinstance(value, Tensor) and value.ndim:
                lengths.append(Fraction(value.shape[0], per_image))
                return (value.shape[1:], value.dtype, value.device)
            if isinstance(value, list | tuple):
                lengths.append(Fraction(len(value), per_image))
                distinct = dict.fromkeys(_item_key(item, digests) for item in value)
                return (type(value), tuple(distinct))
            raise NotMergeable("an argument lost its batch axis")
        case Shared(kind):
            if not isinstance(value, kind):
                raise NotMergeable("an argument changed its type")
            return _shared_key(value, digests)
        case PerRow():
            if isinstance(value, Tensor) and value.ndim:
                raise NotMergeable("the timestep is no longer a scalar")
            return None
        case Branch(children):
            if not isinstance(value, dict | list | tuple):
                raise NotMergeable("an argument changed its structure")
            items = _items(value)
            if [key for key, _ in items] != [key for key, _ in children]:
                raise NotMergeable("an argument changed its structure")
            return tuple(
                (key, merge_key(child, item, lengths, digests))
                for (key, child), (_, item) in zip(children, items, strict=True)
            )


def _shared_key(value: Any, digests: Digests) -> Hashable:
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.device, digests.of(value))
    try:
        hash(value)
    except TypeError:
        return ("object", id(value))
    return (type(value), value)


def _item_key(value: Any, digests: Digests) -> Hashable:
    """Return the key of one image's item of a list: a tensor's shape, or any other value itself.

    The value may be a shape, such as an item of Qwen-Image's ``img_shapes``. Images of 64x32 and
    of 32x64 have equally many tokens, and a network may read only the first shape.
    """
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.device)
    if isinstance(value, dict | list | tuple):
        items = tuple((key, _item_key(item, digests)) for key, item in _items(value))
        return (type(value), items)
    return _shared_key(value, digests)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in an argument or an output, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for _, item in _items(value):
            yield from tensors(item)


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return a copy of an argument or an output, with ``change`` of each of its tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict | list | tuple):
        return _rebuild(value, [map_tensors(change, item) for _, item in _items(value)])
    return value


def first_batched(axis: Axis, value: Any) -> Tensor | None:
    """Return the first tensor in ``value`` that carries the batch: usually the latents."""
    match axis:
        case Rows():
            return value if isinstance(value, Tensor) else None
        case Branch(children):
            for (_, child), (_, item) in zip(children, _items(value), strict=True):
                if (found := first_batched(child, item)) is not None:
                    return found
    return None


def merge(axis: Axis, values: Sequence[Any], inputs: Sequence[Tensor]) -> Any:
    """Join ``values`` along ``axis``; ``inputs`` holds the first batched tensor of each call."""
    match axis:
        case Rows():
            if isinstance(values[0], Tensor):
                return torch.cat(list(values))
            return type(values[0])(item for value in values for item in value)
        case PerRow():
            return _per_row(values, inputs)
        case Branch(children):
            merged = [
                merge(child, [_items(value)[index][1] for value in values], inputs)
                for index, (_, child) in enumerate(children)
            ]
            return _rebuild(values[0], merged)
        case _:
            return values[0]


def _per_row(values: Sequence[Any], inputs: Sequence[Tensor]) -> Tensor:
    """Return one timestep for each row of ``inputs``; integers among floats become floats."""
    # diffusers reads a bare Python number as int64 or float64.
    kinds = {int: torch.int64, float: torch.float64}
    timesteps = [
        value if isinstance(value, Tensor) else torch.tensor(value, dtype=kinds[type(value)])
        for value in values
    ]
    dtype = functools.reduce(torch.promote_types, (timestep.dtype for timestep in timesteps))
    return torch.cat(
        [
            timestep.to(rows.device, dtype).expand(rows.shape[0])
            for timestep, rows in zip(timesteps, inputs, strict=True)
        ]
    )


def _rebuild(template: Any, values: list[Any]) -> Any:
    """Return a container like ``template`` with other items.

    diffusers' outputs are dataclasses that are dicts.
    """
    if isinstance(template, dict):
        pairs = dict(zip(template, values, strict=True))
        return pairs if type(template) is dict else type(template)(**pairs)
    if hasattr(template, "_fields"):
        return type(template)(*values)
    return type(template)(values)


def split(axis: Axis, output: Any, lengths: Sequence[Fraction]) -> list[Any]:
    """Cut ``output`` into parts of these ``lengths``, relative to one image; views, not copies.

    Raises:
        NotMergeable: the output has another number of rows.
    """
    match axis:
        case Rows(per_image):
            counts = [int(length * per_image) for length in lengths]
            if len(output) != sum(counts):
                raise NotMergeable(f"an output has {len(output)} rows instead of {sum(counts)}")
            if isinstance(output, Tensor):
                return list(output.split(counts))
            ends = [sum(counts[: index + 1]) for index in range(len(counts))]
            return [output[end - count : end] for end, count in zip(ends, counts, strict=True)]
        case Branch(children):
            parts = [
                split(child, item, lengths)
                for (_, child), (_, item) in zip(children, _items(output), strict=True)
            ]
            return [_rebuild(output, [part[i] for part in parts]) for i in range(len(lengths))]
        case _:
            return [output] * len(lengths)
