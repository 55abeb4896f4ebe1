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
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from serve_app.engine.batching.padding import Prompts, bucket_length, join, join_masks

TIMESTEP_NAMES = ("timestep", "timesteps")
"""Arguments whose scalar is expanded to one value per row, so that rows may differ in it."""


class NotMergeable(Exception):
    """The call cannot be merged with any other call; it runs by itself."""


@dataclass(frozen=True)
class Rows:
    """A tensor or list whose first dimension grows with the batch."""

    per_image: int
    """Length for one image in the learned call.

    Only ratios between arguments matter: without guidance every argument is half as long."""
    prompt_dim: int | None = None
    """Dimension that is as long as the prompt, of the tensor or of the list's items, if any.

    Calls may differ in its length. Tensors are padded; the network joins items of a list itself."""


@dataclass(frozen=True)
class FirstRow(Rows):
    """A batched tensor of which the network reads one row for all: equal in merged calls.

    Such are the positions of tokens in some networks."""


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
class Mask:
    """``None`` as long as no prompt is padded; then a tensor that tells prompts from padding."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Branch:
    """A list, tuple or dict, item by item."""

    children: tuple[tuple[Hashable, "Axis"], ...]


Axis = Rows | Shared | PerRow | Mask | Branch


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
        if next(tensors((one, two)), None) is None and _equal(one, two):
            return Shared(type(one))  # other calls may have more items, such as an image's shape
    elif _equal(one, two):
        return Shared(type(one))
    else:
        raise NotMergeable(f"{name} is {one!r} for one image and {two!r} for two")
    pairs = zip(items(one), items(two), strict=True)
    return Branch(tuple((key, compare(key, a, b)) for (key, a), (_, b) in pairs))


def _equal(one: Any, two: Any) -> bool:
    try:
        return one is two or bool(one == two)
    except (TypeError, ValueError, RuntimeError):  # arrays and the like have no single answer
        return False


def items(value: Any) -> list[tuple[Hashable, Any]]:
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
        case FirstRow(per_image) if isinstance(value, Tensor) and value.ndim:
            lengths.append(Fraction(value.shape[0], per_image))
            return _shared_key(value, digests)
        case Rows(per_image, prompt_dim):
            if isinstance(value, Tensor) and value.ndim:
                lengths.append(Fraction(value.shape[0], per_image))
                if prompt_dim is not None:
                    return _prompt_key([value], prompt_dim, 1)
                return (value.shape[1:], value.dtype, value.device)
            if isinstance(value, list | tuple):
                lengths.append(Fraction(len(value), per_image))
                if prompt_dim is not None:
                    return _prompt_key(value, prompt_dim, 0)
                distinct = dict.fromkeys(_item_key(item, digests) for item in value)
                return (type(value), tuple(distinct))
            raise NotMergeable("an argument lost its batch axis")
        case Shared(kind):
            if not isinstance(value, kind):
                raise NotMergeable("an argument changed its type")
            return _shared_key(value, digests)
        case Mask(dtype):
            if value is not None and not (isinstance(value, Tensor) and value.dtype == dtype):
                raise NotMergeable("a mask changed its type")
            return None
        case PerRow():
            if isinstance(value, Tensor) and value.ndim:
                raise NotMergeable("the timestep is no longer a scalar")
            return None
        case Branch(children):
            if not isinstance(value, dict | list | tuple):
                raise NotMergeable("an argument changed its structure")
            pairs = items(value)
            if [key for key, _ in pairs] != [key for key, _ in children]:
                raise NotMergeable("an argument changed its structure")
            return tuple(
                (key, merge_key(child, item, lengths, digests))
                for (key, child), (_, item) in zip(children, pairs, strict=True)
            )


def _prompt_key(values: Sequence[Any], prompt_dim: int, first_dim: int) -> Hashable:
    """Return the key of tensors that are as long as their prompts.

    It holds the bucket of the longest one, and the other dimensions from ``first_dim`` on.
    """
    if not (values and all(isinstance(one, Tensor) and one.ndim > prompt_dim for one in values)):
        raise NotMergeable("an argument changed its structure")
    bucket = bucket_length(max(one.shape[prompt_dim] for one in values))
    distinct = dict.fromkeys(
        (one.shape[first_dim:prompt_dim], one.shape[prompt_dim + 1 :], one.dtype, one.device)
        for one in values
    )
    return (bucket, tuple(distinct))


def _shared_key(value: Any, digests: Digests) -> Hashable:
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.device, digests.of(value))
    try:
        hash(value)
    except TypeError:
        if isinstance(value, dict | list | tuple):
            if next(tensors(value), None) is not None:
                raise NotMergeable("an argument changed its structure") from None
            return _item_key(value, digests)
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
        return (type(value), tuple((key, _item_key(item, digests)) for key, item in items(value)))
    return _shared_key(value, digests)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in an argument or an output, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for _, item in items(value):
            yield from tensors(item)


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return a copy of an argument or an output, with ``change`` of each of its tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict | list | tuple):
        return rebuild(value, [map_tensors(change, item) for _, item in items(value)])
    return value


def batched(axis: Axis, value: Any) -> Iterator[tuple[Rows, Tensor]]:
    """Yield the tensors in ``value`` that carry the batch, with their axes: first the latents."""
    match axis:
        case Rows():
            if isinstance(value, Tensor):
                yield axis, value
        case Branch(children):
            for (_, child), (_, item) in zip(children, items(value), strict=True):
                yield from batched(child, item)


def merge(
    axis: Axis, values: Sequence[Any], inputs: Sequence[Tensor], prompts: Prompts | None = None
) -> Any:
    """Join ``values`` along ``axis``.

    Args:
        inputs: First batched tensor of each call.
        prompts: Prompts of the calls, if these may differ in length.
    """
    match axis:
        case Rows(_, prompt_dim):
            if isinstance(values[0], Tensor):
                if prompt_dim is None or prompts is None:
                    return torch.cat(list(values))
                return join(values, prompt_dim, prompts.length)
            return type(values[0])(item for value in values for item in value)
        case PerRow():
            return _per_row(values, inputs)
        case Mask(dtype):
            return None if prompts is None else join_masks(values, prompts, dtype)
        case Branch(children):
            merged = [
                merge(child, [items(value)[index][1] for value in values], inputs, prompts)
                for index, (_, child) in enumerate(children)
            ]
            return rebuild(values[0], merged)
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
    # Those of the CPU stay there, so that all of them are copied to the device at once.
    on_cpu = all(timestep.is_cpu for timestep in timesteps)
    return torch.cat(
        [
            timestep.to("cpu" if on_cpu else rows.device, dtype).expand(rows.shape[0])
            for timestep, rows in zip(timesteps, inputs, strict=True)
        ]
    )


def rebuild(template: Any, values: list[Any]) -> Any:
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
                for (_, child), (_, item) in zip(children, items(output), strict=True)
            ]
            return [rebuild(output, [part[i] for part in parts]) for i in range(len(lengths))]
        case _:
            return [output] * len(lengths)
