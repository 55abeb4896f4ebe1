"""The load of one engine: offered work, backlog and throughput, by which replicas are scaled.

The engine's thread reports events; any thread may read. Work is measured in solo seconds, as
defined in `serve_app.protocol.load`. A device that batches requests does more than one solo second
of work per second. Pure Python.
"""

import threading
from collections import deque

from serve_app.protocol.load import ReplicaLoad

WINDOW_S = 30
"""Window for rates and shares of time."""

_MEAN_WEIGHT = 0.05
"""Weight of the last request in the smoothed work of a request."""

_LEAST_THROUGHPUT = 0.1
"""Lower bound of the throughput. A smaller value means a fault, and would inflate backlogs."""


class _Window:
    """Sum of the amounts of the last `WINDOW_S`, in buckets of one second."""

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, float]] = deque()

    def add(self, now: float, amount: float) -> None:
        self._forget(now)
        second = int(now)
        if self._seconds and self._seconds[-1][0] == second:
            amount += self._seconds.pop()[1]
        self._seconds.append((second, amount))

    def total(self, now: float) -> float:
        self._forget(now)
        return sum(amount for _, amount in self._seconds)

    def _forget(self, now: float) -> None:
        while self._seconds and self._seconds[0][0] <= now - WINDOW_S - 1:
            self._seconds.popleft()


class Throughput:
    """Solo seconds of work done per busy second, smoothed; 1 while unknown."""

    __slots__ = ("_saved_s", "_took_s")

    def __init__(self) -> None:
        # Decaying sums: about a third of a busy second is left after WINDOW_S more busy seconds.
        self._took_s = 0.0
        self._saved_s = 0.0  # by batched calls

    def called(self, solo_s: float, seconds: float) -> None:
        """Report calls of ``seconds`` in all, which would take ``solo_s`` without batching."""
        self._saved_s += solo_s - seconds

    def busy(self, seconds: float) -> None:
        """Report time that passed with work present, time in calls included."""
        fading = max(0.0, 1 - seconds / WINDOW_S)
        self._saved_s *= fading
        self._took_s = self._took_s * fading + seconds

    def value(self) -> float:
        """Return solo seconds of work per busy second."""
        # One neutral second damps the first calls. Work outside denoiser calls is not batched: it
        # takes its solo seconds.
        took_s = self._took_s + 1.0
        return max(_LEAST_THROUGHPUT, (took_s + self._saved_s) / took_s)


class LoadTracker:
    """Tracker of one engine's load. Times are in seconds on any one clock; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._remaining_s = {False: 0.0, True: 0.0}  # by low priority
        self._requests = {False: 0, True: 0}
        self._offered = _Window()
        self._busy = _Window()
        self._mean_s = 0.0
        self._counted_until = 0.0
        self._throughput = Throughput()

    def offered(self, now: float, solo_s: float) -> None:
        """Report the first arrival of an interactive request that is feasible on some replica."""
        with self._lock:
            self._offered.add(now, solo_s)
            weight = _MEAN_WEIGHT if self._mean_s else 1.0
            self._mean_s += weight * (solo_s - self._mean_s)

    def accepted(self, now: float, solo_s: float, low_priority: bool) -> None:
        """Report an accepted request."""
        with self._lock:
            self._pass_to(now)
            self._remaining_s[low_priority] += solo_s
            self._requests[low_priority] += 1

    def called(self, solo_s: float, seconds: float) -> None:
        """Report a denoiser call of ``seconds``, which would take ``solo_s`` without batching."""
        with self._lock:
            self._throughput.called(solo_s, seconds)

    def update_remaining(
        self, now: float, before_s: float, left_s: float, low_priority: bool
    ) -> None:
        """Update the remaining work of an accepted request, from ``before_s`` to ``left_s``.

        It grows if the request turns out to take longer than predicted.
        """
        with self._lock:
            self._pass_to(now)
            self._remaining_s[low_priority] += left_s - before_s

    def ended(self, now: float, left_s: float, low_priority: bool) -> None:
        """Report the end of a request, with ``left_s`` of its work not done."""
        with self._lock:
            self._pass_to(now)
            self._remaining_s[low_priority] -= left_s
            self._requests[low_priority] -= 1
            if not self._requests[low_priority]:
                self._remaining_s[low_priority] = 0.0  # drop rounding errors

    def throughput(self) -> float:
        """Return solo seconds of work done per busy second, smoothed."""
        with self._lock:
            return self._throughput.value()

    def backlog_s(self, low_priority: bool = False) -> float:
        """Return the seconds to finish all accepted work, at the measured throughput."""
        with self._lock:
            return self._backlog_s(low_priority)

    def load(self, now: float) -> ReplicaLoad:
        """Return the current load."""
        with self._lock:
            self._pass_to(now)
            return ReplicaLoad(
                backlog_s=self._backlog_s(False),
                batch_backlog_s=self._backlog_s(True),
                arrival_rate=self._offered.total(now) / WINDOW_S,
                throughput=self._throughput.value(),
                mean_work_s=self._mean_s,
                utilization=min(1.0, self._busy.total(now) / WINDOW_S),
            )

    def _backlog_s(self, low_priority: bool) -> float:
        return max(0.0, self._remaining_s[low_priority]) / self._throughput.value()

    def _pass_to(self, now: float) -> None:
        """Count the time until ``now``, during which the number of requests did not change."""
        busy_s = max(0.0, now - self._counted_until)  # two threads may arrive out of order
        self._counted_until += busy_s
        if not any(self._requests.values()):
            return
        if self._requests[False]:
            self._busy.add(now, busy_s)
        self._throughput.busy(busy_s)
