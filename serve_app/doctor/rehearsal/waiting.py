"""Time in a rehearsal: bounded waits for the cluster, and progress lines."""

import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from serve_app.doctor.kube import Unreachable
from serve_app.doctor.kube_write import Refused

T = TypeVar("T")

POLL_S = 2.0
"""Interval at which KubeRay's operator reconciles a RayService: 2 s."""

OUTAGE_S = 60.0
"""Longest absence of the API server: a control plane's rolling update takes no longer."""

REPEAT_S = 60.0
"""Interval at which an unchanged state is printed again."""

TOTAL_S = 3 * 3600.0
"""The longest rehearsal: two starts that pull images and weights, and all other steps."""


class Clock(Protocol):
    """A source of time; a test's clock skips waits."""

    def now(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The machine's own clock."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Waiter:
    """Polls for a result, and prints each new state once."""

    def __init__(self, clock: Clock, emit: Callable[[str], None]) -> None:
        """Start the clock; ``emit`` receives each line."""
        self._clock = clock
        self._emit = emit
        self._started_at = clock.now()
        self._printed = ("", 0.0)

    def elapsed_s(self) -> float:
        """Return the seconds since the rehearsal began."""
        return self._clock.now() - self._started_at

    def emit(self, text: str) -> None:
        """Print one line with its time."""
        self._emit(f"{self.elapsed_s():6.0f} s  {text}")

    def progress(self, text: str) -> None:
        """Print the state if it is new, or was printed some time ago."""
        details, at_s = self._printed
        if text != details or self.elapsed_s() - at_s >= REPEAT_S:
            self._printed = (text, self.elapsed_s())
            self.emit(f"    {text}")

    def until(
        self,
        probe: Callable[[], T | None],
        timeout_s: float,
        between: Callable[[], object] = lambda: None,
        bounded: bool = True,
    ) -> T | None:
        """Return the first value of ``probe`` that is not None; None if it takes too long.

        ``between`` is called before each pause; with ``bounded`` `TOTAL_S` counts as well.

        Raises:
            NotReadable: if the API server rejects a request, or is away for `OUTAGE_S`.
        """
        ends_at = self.elapsed_s() + timeout_s
        if bounded:
            ends_at = min(ends_at, TOTAL_S)
        answered_at = self.elapsed_s()
        while True:
            try:
                value = probe()
                between()
                answered_at = self.elapsed_s()
            except (Unreachable, Refused) as error:
                passes = isinstance(error, Unreachable) or error.status in (429, 500, 502, 503, 504)
                if not passes or self.elapsed_s() - answered_at >= OUTAGE_S:
                    raise
                self.progress(error.found)
                value = None
            if value is not None:
                return value
            if self.elapsed_s() >= ends_at:
                return None
            self._clock.sleep(POLL_S)
