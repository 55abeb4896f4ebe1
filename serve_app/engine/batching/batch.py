"""Merging denoiser calls along the batch axis, and splitting what comes back.

Which argument carries the batch is learned, not guessed: `BatchSpec.learn` compares a call for one
picture with the same call for two. Pure functions of tensors; knows no pipeline and no request.
"""

import functools
import hashlib
import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from serve_app.engine.batching.rendezvous import Call

TIMESTEP_NAMES = ("timestep", "timesteps")
"""Arguments whose scalar is expanded to one value per row, so that rows may differ in it."""


class NotMergeable(Exception):
    """The call cannot share a forward with any other; it runs alone."""


@dataclass(frozen=True)
class Rows:
    """A tensor or list whose first dimension grows with the batch.

    ``per_image`` is its length for one picture in the learned call. Only ratios between arguments
    count: without guidance every one of them is half as long.
    """

    per_image: int


@dataclass(frozen=True)
class Shared:
    """A value that does not grow with the batch; equal in all calls that are merged."""

    kind: type
    """What was learned holds for values of this type only: a tensor in place of a ``None`` may
    well carry the batch."""


@dataclass(frozen=True)
class PerRow:
    """A scalar timestep; one value per row once merged."""


@dataclass(frozen=True)
class Branch:
    """A list, tuple or dict, item by item."""

    children: tuple[tuple[Hashable, "Axis"], ...]


Axis = Rows | Shared | PerRow | Branch

_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (Tensor, NoneType, bool, int, float, str, torch.dtype, torch.device, torch.Size)
}
"""Of shared values, those that can be written down: a name from a file must never import code."""


class NotWritable(Exception):
    """What was learned has no form in JSON."""


def _axis_to_json(axis: Axis) -> Any:
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
            return {"branch": [[key, _axis_to_json(child)] for key, child in children]}


def _axis_from_json(value: Any) -> Axis:
    [(what, content)] = value.items()
    match what:
        case "rows":
            if not (isinstance(content, int) and content > 0):
                raise ValueError(f"{content!r} rows")
            return Rows(content)
        case "per_row":
            return PerRow()
        case "shared":
            return Shared(_KINDS[content])
        case "branch":
            return Branch(tuple((key, _axis_from_json(child)) for key, child in content))
        case _:
            raise ValueError(f"{what!r} is no axis")


def _items(value: Any) -> list[tuple[Hashable, Any]]:
    return list(value.items() if isinstance(value, dict) else enumerate(value))


def _equal(one: Any, two: Any) -> bool:
    try:
        return one is two or bool(one == two)
    except (TypeError, ValueError, RuntimeError):  # arrays and the like have no single answer
        return False


def _compare(name: Hashable, one: Any, two: Any) -> Axis:
    """How ``one``, from a call for one picture, became ``two`` in the call for two."""
    if type(one) is not type(two):
        raise NotMergeable(f"{name} is {type(one).__name__} for one picture, {type(two).__name__}")
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
            f"{name} has shape {list(one.shape)} for one picture and {list(two.shape)} for two"
        )
    if isinstance(one, dict):
        if one.keys() != two.keys():
            raise NotMergeable(f"{name} has other keys for two pictures")
    elif isinstance(one, list | tuple):
        if one and len(two) == 2 * len(one):
            return Rows(len(one))
        if len(one) != len(two):
            raise NotMergeable(f"{name} has {len(one)} items for one picture, {len(two)} for two")
    elif _equal(one, two):
        return Shared(type(one))
    else:
        raise NotMergeable(f"{name} is {one!r} for one picture and {two!r} for two")
    pairs = zip(_items(one), _items(two), strict=True)
    return Branch(tuple((key, _compare(key, a, b)) for (key, a), (_, b) in pairs))


class _Digests:
    """Digests of the contents of tensors, each made once per tensor and version."""

    def __init__(self) -> None:
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def of(self, tensor: Tensor) -> bytes:
        """Equal for equal contents. Costs a copy off the device when it is new."""
        known = self._known.get(tensor)
        if known is None or known[0] != tensor._version:
            content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            known = (tensor._version, hashlib.blake2b(content.data, digest_size=16).digest())
            self._known[tensor] = known
        digest: bytes = known[1]
        return digest


def _shared_key(value: Any, digests: _Digests) -> Hashable:
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.device, digests.of(value))
    try:
        hash(value)
    except TypeError:
        return ("object", id(value))
    return (type(value), value)


def _item_key(value: Any, digests: _Digests) -> Hashable:
    """One picture's item of a list: the shape of a tensor, and the value of anything else.

    A value stands for a shape there, as Qwen-Image's ``img_shapes`` do: pictures of 64x32 and of
    32x64 have as many tokens, and a network may well read the shape of the first alone.
    """
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.device)
    if isinstance(value, dict | list | tuple):
        items = tuple((key, _item_key(item, digests)) for key, item in _items(value))
        return (type(value), items)
    return _shared_key(value, digests)


def tensors(value: Any) -> Iterator[Tensor]:
    """Those in an argument or an output, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for _, item in _items(value):
            yield from tensors(item)


def _key(axis: Axis, value: Any, lengths: list[Fraction], digests: _Digests) -> Hashable:
    """What must be equal among merged calls; notes each length relative to one picture's."""
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
                (key, _key(child, item, lengths, digests))
                for (key, child), (_, item) in zip(children, items, strict=True)
            )


def _rebuild(template: Any, values: list[Any]) -> Any:
    """A container like ``template`` with other items; diffusers' outputs are dataclass dicts."""
    if isinstance(template, dict):
        pairs = dict(zip(template, values, strict=True))
        return pairs if type(template) is dict else type(template)(**pairs)
    if hasattr(template, "_fields"):
        return type(template)(*values)
    return type(template)(values)


def _merge(axis: Axis, values: Sequence[Any], inputs: Sequence[Tensor]) -> Any:
    match axis:
        case Rows():
            if isinstance(values[0], Tensor):
                return torch.cat(list(values))
            return type(values[0])(item for value in values for item in value)
        case PerRow():
            return _per_row(values, inputs)
        case Branch(children):
            merged = [
                _merge(child, [_items(value)[index][1] for value in values], inputs)
                for index, (_, child) in enumerate(children)
            ]
            return _rebuild(values[0], merged)
        case _:
            return values[0]


def _per_row(values: Sequence[Any], inputs: Sequence[Tensor]) -> Tensor:
    """One timestep for each row of ``inputs``; integers and reals meet as reals."""
    # diffusers reads a bare Python number as int64 or float64.
    kinds = {int: torch.int64, float: torch.float64}
    tensors = [
        value if isinstance(value, Tensor) else torch.tensor(value, dtype=kinds[type(value)])
        for value in values
    ]
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return torch.cat(
        [
            tensor.to(rows.device, dtype).expand(rows.shape[0])
            for tensor, rows in zip(tensors, inputs, strict=True)
        ]
    )


def _split(axis: Axis, output: Any, lengths: Sequence[Fraction]) -> list[Any]:
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
                _split(child, item, lengths)
                for (_, child), (_, item) in zip(children, _items(output), strict=True)
            ]
            return [_rebuild(output, [part[i] for part in parts]) for i in range(len(lengths))]
        case _:
            return [output] * len(lengths)


def _input_of(axis: Axis, value: Any) -> Tensor | None:
    """The first tensor that carries the batch: the latents, as a rule."""
    match axis:
        case Rows():
            return value if isinstance(value, Tensor) else None
        case Branch(children):
            for (_, child), (_, item) in zip(children, _items(value), strict=True):
                if (found := _input_of(child, item)) is not None:
                    return found
    return None


def _parameters(signature: inspect.Signature, call: Call) -> dict[str, Any]:
    """The call's arguments by name, however they were passed."""
    values: dict[str, Any] = {}
    for name, value in signature.bind(*call.args, **call.kwargs).arguments.items():
        match signature.parameters[name].kind:
            case inspect.Parameter.VAR_KEYWORD:
                values |= value
            case inspect.Parameter.VAR_POSITIONAL | inspect.Parameter.POSITIONAL_ONLY:
                raise NotMergeable(f"the network takes {name} by position only")
            case _:
                values[name] = value
    return values


@dataclass(frozen=True)
class MergeableCall:
    """A call with what merging needs to know of it."""

    call: Call
    key: Hashable
    """Calls with equal keys may be merged."""
    values: dict[str, Any]
    length: Fraction
    """Its rows, relative to those of one picture in the learned call."""


@dataclass(frozen=True)
class BatchSpec:
    """Where the batch axis is in the arguments and in the output of one network."""

    signature: inspect.Signature
    arguments: Branch
    output: Axis
    _digests: _Digests = field(default_factory=_Digests, repr=False, compare=False)

    @classmethod
    def learn(
        cls, forward: Callable[..., Any], one: tuple[Call, Any], two: tuple[Call, Any]
    ) -> "BatchSpec":
        """Compare a call and its output for one picture with those for two.

        Raises:
            NotMergeable: saying which argument fits neither way.
        """
        signature = inspect.signature(forward)
        parameters = _parameters(signature, one[0])
        arguments = _compare("arguments", parameters, _parameters(signature, two[0]))
        assert isinstance(arguments, Branch)
        if _input_of(arguments, parameters) is None:
            raise NotMergeable("no tensor among the arguments grows with the number of pictures")
        return cls(signature, arguments, _compare("output", one[1], two[1]))

    def to_json(self) -> dict[str, Any]:
        """What was learned, without the network. Raises `NotWritable`."""
        return {"arguments": _axis_to_json(self.arguments), "output": _axis_to_json(self.output)}

    @classmethod
    def from_json(cls, forward: Callable[..., Any], value: dict[str, Any]) -> "BatchSpec":
        """What `to_json` gave, for the same network.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: if it did not come from there.
        """
        arguments = _axis_from_json(value["arguments"])
        if not isinstance(arguments, Branch):
            raise ValueError("the arguments are no branch")
        return cls(inspect.signature(forward), arguments, _axis_from_json(value["output"]))

    def prepare(self, call: Call) -> MergeableCall:
        """Find out with which other calls this one may be merged. Raises `NotMergeable`."""
        lengths: list[Fraction] = []
        values = _parameters(self.signature, call)
        key = _key(self.arguments, values, lengths, self._digests)
        if len(set(lengths)) != 1:
            raise NotMergeable("the arguments disagree about the number of rows")
        return MergeableCall(call, (call.site, key), values, lengths[0])

    def merge(self, calls: Sequence[MergeableCall]) -> Call:
        """One call for all of ``calls``, whose keys are equal. A single one is left as it is."""
        if len(calls) == 1:
            return calls[0].call
        inputs = [_input_of(self.arguments, call.values) for call in calls]
        merged = _merge(
            self.arguments,
            [call.values for call in calls],
            [tensor for tensor in inputs if tensor is not None],
        )
        return replace(calls[0].call, args=(), kwargs=merged)

    def split(self, output: Any, calls: Sequence[MergeableCall]) -> list[Any]:
        """Each call's share of the merged output; views, not copies. Raises `NotMergeable`."""
        if len(calls) == 1:
            return [output]
        return _split(self.output, output, [call.length for call in calls])
