"""Merging of denoiser calls along the batch axis, and splitting of their output.

The argument that carries the batch is learned, not guessed: `BatchSpec.learn` compares a call for
one image with the same call for two images.
"""

import functools
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import takewhile
from typing import Any

from serve_app.engine.batching import axis, axis_json, lengths
from serve_app.engine.batching.axis import Axis, Branch, NotMergeable
from serve_app.engine.batching.padding import Prompts, bucket_length
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
        if not any(axis.batched(arguments, values)):
            raise NotMergeable("no tensor among the arguments grows with the number of images")
        return cls(signature, arguments, axis.compare("output", one[1], two[1]))

    def learn_prompts(self, one: tuple[Call, Any], both: tuple[Call, Any]) -> "BatchSpec":
        """Return a spec that merges calls with prompts of different lengths.

        Args:
            one: A call and its output for one prompt.
            both: The same for that prompt and a longer one.

        Raises:
            NotMergeable: an argument depends on the prompt in a way that no padding can equal.
        """
        values = _arguments_by_name(self.signature, one[0])
        both_values = _arguments_by_name(self.signature, both[0])
        arguments = lengths.learn(self.arguments, "arguments", values, both_values)
        assert isinstance(arguments, Branch)
        if lengths.learn(self.output, "output", one[1], both[1]) != self.output:
            raise NotMergeable("the output is as long as the prompt")
        return replace(self, arguments=arguments)

    def to_json(self) -> dict[str, Any]:
        """Return the spec without the network's signature. Raises `NotWritable`."""
        return {
            "arguments": axis_json.to_json(self.arguments),
            "output": axis_json.to_json(self.output),
        }

    @classmethod
    def from_json(cls, forward: Callable[..., Any], value: dict[str, Any]) -> "BatchSpec":
        """Read the result of `to_json`, for the same network.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: ``value`` is not such a result.
        """
        arguments = axis_json.from_json(value["arguments"])
        if not isinstance(arguments, Branch):
            raise ValueError("the arguments are no branch")
        return cls(inspect.signature(forward), arguments, axis_json.from_json(value["output"]))

    def prepare(self, call: Call) -> MergeableCall:
        """Determine which other calls this one may be merged with. Raises `NotMergeable`."""
        lengths: list[Fraction] = []
        values = self._completed(self._by_name(call))
        key = axis.merge_key(self.arguments, values, lengths, self._digests)
        if len(set(lengths)) != 1:
            raise NotMergeable("the arguments disagree about the number of rows")
        return MergeableCall(call, (call.site, key), values, lengths[0])

    def _by_name(self, call: Call) -> dict[str, Any]:
        """Return the same as `_arguments_by_name`, in a sixth of its time for common calls."""
        values = dict(zip(self._names, call.args, strict=False))
        values |= {name: call.kwargs[name] for name in self._names if name in call.kwargs}
        if len(values) == len(call.args) + len(call.kwargs):
            return values
        return _arguments_by_name(self.signature, call)  # further names, or an error

    @functools.cached_property
    def _names(self) -> tuple[str, ...]:
        """The first parameters that are passed by position or by name, in order."""
        either = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = self.signature.parameters.values()
        return tuple(one.name for one in takewhile(lambda one: one.kind is either, parameters))

    def _completed(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments with the defaults of those that the call leaves out.

        A pipeline may leave out for one task what it passes for another.
        """
        if len(values) >= len(self.arguments.children):
            return values
        learned = {name for name, _ in self.arguments.children}
        parameters = self.signature.parameters.items()
        return {name: one.default for name, one in parameters if name in learned} | values

    @functools.cached_property
    def joins_prompts(self) -> bool:
        """True if merged calls may have prompts of different lengths."""
        return lengths.vary(self.arguments)

    def merge(self, calls: Sequence[MergeableCall], length: int | None = None) -> Call:
        """Join ``calls``, whose keys are equal, into one. A single call stays as it is.

        Args:
            length: Tokens to pad prompts to, also those of a single call; ``None`` for the longest
                prompt. Has no effect if the network takes prompts as a list.
        """
        prompts = self._prompts(calls, length) if self.joins_prompts else None
        if len(calls) == 1 and (prompts is None or length is None):
            return calls[0].call
        inputs = [next(axis.batched(self.arguments, call.values))[1] for call in calls]
        values = [call.values for call in calls]
        merged = axis.merge(self.arguments, values, inputs, prompts)
        return replace(calls[0].call, args=(), kwargs=merged)

    def bucket(self, calls: Sequence[MergeableCall]) -> int | None:
        """Return the padded length of the prompts of ``calls``; ``None`` if they stay as they are.

        Few lengths are few shapes, for networks that are compiled for each shape.
        """
        prompts = self._prompts(calls, None) if self.joins_prompts else None
        return None if prompts is None else bucket_length(max(prompts.tokens))

    def _prompts(self, calls: Sequence[MergeableCall], length: int | None) -> Prompts | None:
        """Return the sizes of each call's first prompts; ``None`` if these are not tensors."""
        rows, tokens = [], []
        for call in calls:
            for kind, tensor in axis.batched(self.arguments, call.values):
                if kind.prompt_dim is not None:
                    rows.append(tensor.shape[0])
                    tokens.append(tensor.shape[kind.prompt_dim])
                    break
            else:
                return None
        return Prompts(tuple(rows), tuple(tokens), tensor.device, length)

    def resized(self, call: MergeableCall, like: MergeableCall) -> MergeableCall:
        """Return ``call`` with prompts as long as those of ``like``, for comparisons."""
        return replace(call, values=lengths.resized(self.arguments, call.values, like.values))

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
