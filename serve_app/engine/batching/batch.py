"""Merging of denoiser calls along the batch axis, and splitting of their output.

The argument that carries the batch is learned, not guessed: `BatchSpec.learn` compares a call for
one image with the same call for two images.
"""

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from serve_app.engine.batching import axis
from serve_app.engine.batching.axis import Axis, Branch, NotMergeable
from serve_app.engine.batching.rendezvous import Call


@dataclass(frozen=True)
class MergeableCall:
    """A call with everything that merging needs to know of it."""

    call: Call
    key: Hashable
    """Key of the merge: calls with equal keys may be merged."""
    values: dict[str, Any]
    """Arguments by name."""
    length: Fraction
    """Number of rows, relative to those of one image in the learned call."""


@dataclass(frozen=True)
class BatchSpec:
    """Position of the batch axis in the arguments and in the output of one network."""

    signature: inspect.Signature
    arguments: Branch
    output: Axis
    _digests: axis.Digests = field(default_factory=axis.Digests, repr=False, compare=False)

    @classmethod
    def learn(
        cls, forward: Callable[..., Any], one: tuple[Call, Any], two: tuple[Call, Any]
    ) -> "BatchSpec":
        """Compare a call and its output for one image with those for two images.

        Raises:
            NotMergeable: an argument or the output has no batch axis; the message says which.
        """
        signature = inspect.signature(forward)
        values = _arguments_by_name(signature, one[0])
        arguments = axis.compare("arguments", values, _arguments_by_name(signature, two[0]))
        assert isinstance(arguments, Branch)
        if axis.first_batched(arguments, values) is None:
            raise NotMergeable("no tensor among the arguments grows with the number of images")
        return cls(signature, arguments, axis.compare("output", one[1], two[1]))

    def to_json(self) -> dict[str, Any]:
        """Return the spec without the network's signature. Raises `NotWritable`."""
        return {"arguments": axis.to_json(self.arguments), "output": axis.to_json(self.output)}

    @classmethod
    def from_json(cls, forward: Callable[..., Any], value: dict[str, Any]) -> "BatchSpec":
        """Read the result of `to_json`, for the same network.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: ``value`` is not such a result.
        """
        arguments = axis.from_json(value["arguments"])
        if not isinstance(arguments, Branch):
            raise ValueError("the arguments are no branch")
        return cls(inspect.signature(forward), arguments, axis.from_json(value["output"]))

    def prepare(self, call: Call) -> MergeableCall:
        """Determine which other calls this one may be merged with. Raises `NotMergeable`."""
        lengths: list[Fraction] = []
        values = _arguments_by_name(self.signature, call)
        key = axis.merge_key(self.arguments, values, lengths, self._digests)
        if len(set(lengths)) != 1:
            raise NotMergeable("the arguments disagree about the number of rows")
        return MergeableCall(call, (call.site, key), values, lengths[0])

    def merge(self, calls: Sequence[MergeableCall]) -> Call:
        """Join ``calls``, whose keys are equal, into one. A single call stays as it is."""
        if len(calls) == 1:
            return calls[0].call
        inputs = [axis.first_batched(self.arguments, call.values) for call in calls]
        merged = axis.merge(
            self.arguments,
            [call.values for call in calls],
            [tensor for tensor in inputs if tensor is not None],
        )
        return replace(calls[0].call, args=(), kwargs=merged)

    def split(self, output: Any, calls: Sequence[MergeableCall]) -> list[Any]:
        """Return each call's part of the merged output, as views. Raises `NotMergeable`."""
        if len(calls) == 1:
            return [output]
        return axis.split(self.output, output, [call.length for call in calls])


def prepare(specs: Mapping[str, BatchSpec], call: Call) -> MergeableCall | None:
    """Determine which other calls this one may be merged with; ``None`` if it must run alone."""
    spec = specs.get(call.site)
    try:
        return spec.prepare(call) if spec else None
    except NotMergeable:
        return None


def _arguments_by_name(signature: inspect.Signature, call: Call) -> dict[str, Any]:
    """Return the call's arguments by name, however the caller passed them."""
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
