"""How much of the engine's time the networks need: what they would take without the engine.

While the engine runs, `BareCalls` notes which calls the networks really made: with which shapes,
and how often. Afterwards it makes each distinct call a few times on its own. The sum, over the
time in which the engine had something to do, is its efficiency: what is left is what the engine,
and the pipelines around the networks, cost. Two times that are measured one after the other: on a
machine that others use too it is off by a tenth now and then, and may pass one.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
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
"""By position and by name."""


@dataclass(frozen=True)
class _Example:
    """One of the calls that are alike."""

    run: Callable[[Arguments], Any]
    arguments: Arguments
    """Tensors of real numbers are on the ``meta`` device."""


class BareCalls:
    """The calls that a pipeline's networks made, by module and shapes."""

    def __init__(self, pipeline: LoadedPipeline) -> None:
        self._pipeline = pipeline
        self._examples: dict[tuple[str, Hashable], _Example] = {}
        self.counts: Counter[tuple[str, Hashable]] = Counter()

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note the calls that are made inside. An engine must be ready before.

        Where requests meet, what really runs passes through `Rendezvous.forward`. The outermost
        modules without such a place in them are watched where they are called.
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

        with ExitStack() as stack:
            stack.enter_context(patch.object(Rendezvous, "forward", forward))
            for name, part in self._pipeline.stock.components.items():
                if isinstance(part, nn.Module):
                    for path, module in _outermost(name, part):
                        stack.callback(watch(path, module))
            yield

    def _note(self, name: str, run: Callable[[Arguments], Any], arguments: Arguments) -> None:
        """Only calls that succeed get here."""
        leaves, structure = pytree.tree_flatten(arguments)
        key = (name, (structure, tuple(_kind(leaf) for leaf in leaves)))
        self.counts[key] += 1
        if key not in self._examples:
            self._examples[key] = _Example(run, pytree.tree_map(_emptied, arguments))

    def seconds(self) -> dict[str, float]:
        """By network, how long the calls that were noted take on their own.

        The engine must be closed. Each distinct call is made a few times, with other numbers of
        the same shapes; its median counts as often as the call was noted. All of them take turns,
        so that a slow moment of a shared device does not meet one alone.
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


def _outermost(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The largest parts whose calls pass no meeting place; an autoencoder's halves are called."""
    if "forward" in vars(module):
        return
    if hasattr(module, "decode") or any("forward" in vars(part) for part in module.modules()):
        for child_name, child in module.named_children():
            yield from _outermost(f"{name}.{child_name}", child)
    else:
        yield name, module


def _kind(leaf: Any) -> Hashable:
    """Shapes and types matter for time; numbers do not."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype
    return str(type(leaf))


def _emptied(leaf: Any) -> Any:
    """Frees the memory of real numbers; integers are few, and may be indices."""
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return torch.empty_like(leaf, device="meta")
    return leaf


def busy_s(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the spans, (start, end), was on."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
