"""CUDA graphs of denoiser calls: a captured call is repeated with a single launch.

A small call on a fast GPU ends before the CPU has launched its kernels one by one. A graph has all
kernels of one call, together with the addresses that they read and write. So inputs are copied to
fixed places, and outputs are copied away at once: the next replay overwrites them.

Graphs are captured while the engine starts. Calls of other shapes run as they always do.
"""

import functools
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from serve_app.engine.batching.axis import TIMESTEP_NAMES, map_tensors, tensors

Mode = Literal["off", "capture", "replay"]
"""Treatment of calls: run them all, capture new ones, or replay those that are captured."""

Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
"""Function that captures a run. It returns a function that repeats the run on the same memory, and
the output of the run, which each repetition overwrites."""

_PLAIN = (NoneType, bool, int, float, str, torch.dtype, torch.device)
"""Types of arguments that a graph holds as constants: calls with other values are other calls."""

_NUMBERS: dict[type, torch.dtype] = {int: torch.int64, float: torch.float64}
"""Dtypes in which diffusers reads a timestep that is a bare number."""


class NotCapturable(Exception):
    """The call cannot be captured; the message says why."""


@dataclass(frozen=True)
class _Graph:
    """One captured call."""

    inputs: list[Tensor]
    output: Any
    replay: Callable[[], None]

    def run(self, given: list[Any]) -> Any:
        """Replay the call with other inputs, and return its output, which stays as it is."""
        for place, value in zip(self.inputs, given, strict=True):
            if isinstance(value, Tensor) and value.device == place.device:
                place.copy_(value)
            else:  # a number travels as an argument of a kernel, without waiting for a copy
                place.fill_(value)
        self.replay()
        return map_tensors(Tensor.clone, self.output)


class Graphs:
    """The graphs of the denoisers of one pipeline. Used by the thread that runs them.

    Attributes:
        replayed: key of the graph that the last call replayed; ``None`` if it ran without one.
    """

    replayed: Hashable = None

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        device: torch.device,
        state: Callable[[], Hashable],
        capture: Capture,
    ) -> None:
        """Wrap the ``forward`` of each network for good.

        Args:
            state: Returns what else a call depends on, such as the active LoRA adapters.
        """
        self._device = device
        self._state = state
        self._capture = capture
        self._mode: Mode = "replay"
        self._graphs: dict[Hashable, _Graph] = {}
        for name, network in networks.items():
            network.forward = self._wrapped(name, network)

    def __len__(self) -> int:
        return len(self._graphs)

    @contextmanager
    def mode(self, mode: Mode) -> Iterator[None]:
        """Treat calls in this way inside the block.

        While calls are captured, one that cannot be raises `NotCapturable`, and one that fails
        raises what the network or CUDA raises, such as ``torch.OutOfMemoryError``.
        """
        before, self._mode = self._mode, mode
        try:
            yield
        finally:
            self._mode = before

    def discard(self, key: Hashable) -> None:
        """Drop one graph."""
        self._graphs.pop(key, None)

    def _wrapped(self, name: str, network: nn.Module) -> Callable[..., Any]:
        forward = network.forward
        signature = inspect.signature(forward)
        attention = getattr(network, "attn_processors", None)

        @functools.wraps(forward)  # pipelines inspect the signature
        def graphed(*args: Any, **kwargs: Any) -> Any:
            self.replayed = None
            if self._mode == "off":
                return forward(*args, **kwargs)
            given: list[Any] = []
            bound = signature.bind(*args, **kwargs)
            try:
                key = (name, self._state(), self._key(name, bound.arguments, given))
            except NotCapturable:
                if self._mode == "capture":
                    raise
                return forward(*args, **kwargs)
            if key not in self._graphs:
                if self._mode != "capture":
                    return forward(*args, **kwargs)
                if getattr(network, "attn_processors", None) != attention:
                    raise NotCapturable(f"the pipeline replaces the attention of {name}")
                inputs = [self._place(value) for value in given]
                places = iter(inputs)
                for argument, value in bound.arguments.items():
                    bound.arguments[argument] = _placed(argument, value, places)
                replay, output = self._capture(lambda: forward(*bound.args, **bound.kwargs))
                self._graphs[key] = _Graph(inputs, output, replay)
            self.replayed = key
            return self._graphs[key].run(given)

        return graphed

    def _key(self, name: Hashable, value: Any, given: list[Any]) -> Hashable:
        """Return a key that is equal for calls that a graph can repeat; append the inputs.

        Raises:
            NotCapturable: a value is neither an input nor a constant.
        """
        if _is_input(name, value):
            if not isinstance(value, Tensor):
                given.append(value)
                return (type(value),)
            if value.ndim and value.device.type != self._device.type:
                raise NotCapturable(f"{name} is a tensor on the {value.device.type}")
            given.append(value)
            return (tuple(value.shape), value.dtype)
        if isinstance(value, dict):
            return tuple((key, self._key(key, item, given)) for key, item in value.items())
        if isinstance(value, list | tuple):
            return (type(value), tuple(self._key(name, item, given) for item in value))
        if isinstance(value, _PLAIN):
            return (type(value), value)
        raise NotCapturable(f"{name} is a {type(value).__name__}")

    def _place(self, value: Any) -> Tensor:
        """Return the fixed place of an input, filled with the value of the captured call."""
        if not isinstance(value, Tensor):
            return torch.tensor(value, dtype=_NUMBERS[type(value)], device=self._device)
        return value.to(self._device, copy=True)


def _is_input(name: Hashable, value: Any) -> bool:
    return isinstance(value, Tensor) or (name in TIMESTEP_NAMES and type(value) in _NUMBERS)


def _placed(name: Hashable, value: Any, places: Iterator[Tensor]) -> Any:
    """Return a copy of an argument, with the places of its inputs."""
    if _is_input(name, value):
        return next(places)
    if isinstance(value, dict):
        return {key: _placed(key, item, places) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_placed(name, item, places) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def reads_of(run: Callable[[], Any]) -> list[Tensor]:
    """Run once; return the tensors that it reads and does not make, one of each memory.

    Networks keep tables, such as those of rotary embeddings, in caches that drop old entries. A
    graph reads their memory, and nothing else keeps it.
    """
    # Compiled code reads tensors without an operation that could be seen.
    with torch.compiler.set_stance("force_eager"), _Reads() as reads:
        run()
    return list(reads.kept.values())


class _Reads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: dict[int, Tensor] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in tensors([args, kwargs]):
            storage = tensor.untyped_storage()._cdata
            if storage not in self._made:
                self.kept[storage] = tensor
        output = operation(*args, **kwargs)
        for tensor in tensors(output):
            if (storage := tensor.untyped_storage()._cdata) not in self.kept:
                self._made.add(storage)
        return output


class CudaCapture:
    """Captures runs on the current GPU.

    All graphs share one pool of memory, because only one runs at a time. A graph may overwrite the
    output of another one, which has been copied by then.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Run three times, and capture the last run.

        The first run fills caches, chooses kernels and compiles. The second one finds what a graph
        reads, and operations that wait for the GPU: they would spoil a capture.

        Raises:
            RuntimeError: the run waits for the GPU, or has an operation that cannot be captured.
            torch.OutOfMemoryError: the graph does not fit into memory.
        """
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
            with _waits_are_errors():
                reads = reads_of(run)
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph,
            pool=self._pool,
            stream=self._stream,
            capture_error_mode="thread_local",  # other threads may use the GPU meanwhile
        ):
            output = run()

        def replay(_: object = reads) -> None:  # keeps them
            graph.replay()

        return replay, output


@contextmanager
def _waits_are_errors() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
