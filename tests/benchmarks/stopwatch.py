"""Exclusive times of functions, added up by layer.

Only for functions that run on one thread and do not park inside: a request that parks leaves the
functions that it is in, without their end.
"""

import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

Layer = str | Callable[..., str]
"""Name of a layer, or a function that names it from the arguments of the call."""

Place = tuple[Any, str, Layer]
"""Class or module, the name of its function, and the layer of that function's time."""


@dataclass
class Stopwatch:
    """Adds up the time of watched functions, without the watched functions that they call."""

    now: Callable[[], float] = time.perf_counter
    """Clock, in seconds."""
    thread: str | None = None
    """Name of the thread whose calls count; ``None`` if only one thread makes them."""
    _spent_s: dict[str, float] = field(default_factory=dict)
    _inner_s: list[float] = field(default_factory=list)

    def spent_ms(self) -> dict[str, float]:
        """Return the milliseconds of each layer."""
        return {name: 1000 * seconds for name, seconds in self._spent_s.items()}

    @contextmanager
    def watching(self, places: Iterable[Place]) -> Iterator[None]:
        """Measure these functions inside the block."""
        with ExitStack() as stack:
            for owner, name, layer in places:
                timed = self._timed(getattr(owner, name), layer)
                stack.enter_context(patch.object(owner, name, timed))
            yield

    def _timed(self, function: Callable[..., Any], layer: Layer) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.thread not in (None, threading.current_thread().name):
                return function(*args, **kwargs)
            self._inner_s.append(0.0)
            started_at = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                took_s = self.now() - started_at
                name = layer if isinstance(layer, str) else layer(*args, **kwargs)
                exclusive_s = took_s - self._inner_s.pop()
                self._spent_s[name] = self._spent_s.get(name, 0.0) + exclusive_s
                if self._inner_s:
                    self._inner_s[-1] += took_s

        return timed
