"""Efficiency of the engine: the time of the bare network calls over the engine's busy time.

While the engine runs, `BareCalls` counts the calls of the networks by their shapes. Afterwards it
makes each distinct call a few times on its own. The sum, over the time in which the engine had a
request, is the efficiency. The rest is the cost of the engine and of the pipelines around the
networks. The two times are measured one after the other: on a shared machine the result is off by
a tenth at times, and may exceed one.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from serve_app.engine.batching.rendezvous import Call, Rendezvous
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.timer import wait_for_device

REPEATS = 3

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


@dataclass(frozen=True)
class _Example:
    """One example of the calls of one shape."""

    run: Callable[[Arguments], Any]
    arguments: Arguments
    """Arguments whose floating-point tensors are on the ``meta`` device."""


class BareCalls:
    """Calls of a pipeline's networks, by module and shapes."""

    def __init__(self, pipeline: LoadedPipeline) -> None:
        self._pipeline = pipeline
        self._examples: dict[tuple[str, Hashable], _Example] = {}
        self.counts: Counter[tuple[str, Hashable]] = Counter()

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Count the calls inside the block; an engine must be ready before.

        Merged calls are counted in `Rendezvous.forward`. Modules without a site inside are counted
        by a hook on the outermost of them.
        """
        real = Rendezvous.forward

        def forward(rendezvous: Rendezvous, call: Call) -> Any:
            output = real(rendezvous, call)
            bare = replace(call, args=(), kwargs={})

            def run(arguments: Arguments) -> Any:
                args, kwargs = arguments
                return real(rendezvous, replace(bare, args=args, kwargs=kwargs))

            self._note(call.site, run, (call.args, call.kwargs))
            return output

        def watch(name: str, module: nn.Module) -> Callable[[], None]:
            def note(_: nn.Module, args: Any, kwargs: Any, __: Any) -> None:
                self._note(
                    name, lambda arguments: module(*arguments[0], **arguments[1]), (args, kwargs)
                )

            return module.register_forward_hook(note, with_kwargs=True).remove

        sites = set(self._pipeline.sites.values())
        with ExitStack() as stack:
            stack.enter_context(patch.object(Rendezvous, "forward", forward))
            for name, part in self._pipeline.stock.components.items():
                if isinstance(part, nn.Module):
                    for path, module in _outermost(name, part, sites):
                        stack.callback(watch(path, module))
            yield

    def _note(self, name: str, run: Callable[[Arguments], Any], arguments: Arguments) -> None:
        """Count a call that succeeded."""
        leaves, structure = pytree.tree_flatten(arguments)
        key = (name, (structure, tuple(_kind(leaf) for leaf in leaves)))
        self.counts[key] += 1
        if key not in self._examples:
            self._examples[key] = _Example(run, pytree.tree_map(_emptied, arguments))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of the counted calls on their own, by network.

        The engine must be closed. Each distinct call is made a few times, with random numbers of
        the same shapes. Its median is multiplied by its count. The calls take turns, so that a slow
        moment of a shared device affects all of them.
        """
        taken: dict[tuple[str, Hashable], list[float]] = {key: [] for key in self._examples}
        for _ in range(REPEATS + 1):
            for key, example in self._examples.items():
                taken[key].append(self._timed(example))
        self._pipeline.restore_networks()
        total: dict[str, float] = {}
        for key, (_, *warm) in taken.items():
            network = key[0].partition(".")[0]
            spent = self.counts[key] * statistics.median(warm)
            total[network] = total.get(network, 0.0) + spent
        return total

    def _timed(self, example: _Example) -> float:
        arguments = pytree.tree_map(self._filled, example.arguments)
        wait_for_device()
        started_at = time.perf_counter()
        with torch.no_grad():
            example.run(arguments)
        wait_for_device()
        return time.perf_counter() - started_at

    def _filled(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_meta:
            return torch.randn_like(leaf, device=self._pipeline.device)
        return leaf


def _outermost(
    name: str, module: nn.Module, sites: Set[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the largest modules without a site inside; of autoencoders, the called halves."""
    if module in sites:
        return
    if hasattr(module, "decode") or any(part in sites for part in module.modules()):
        for child_name, child in module.named_children():
            yield from _outermost(f"{name}.{child_name}", child, sites)
    else:
        yield name, module


def _kind(leaf: Any) -> Hashable:
    """Return what a call's duration depends on: shapes and types, not numbers."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype
    return str(type(leaf))


def _emptied(leaf: Any) -> Any:
    """Drop the memory of floating-point tensors; keep integers, which may be indices."""
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return torch.empty_like(leaf, device="meta")
    return leaf


def busy_s(spans: Iterable[tuple[float, float]]) -> float:
    """Return how long at least one of the spans (start, end) was open."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
