"""What is asked of an engine and what it gets done: the figures by which replicas are scaled.

Pure Python. The engine's thread reports, any thread may look. Work is counted in *alone-seconds*:
what a request takes alone on the device, as predicted when it came. A device that paints several
requests together does more than one of them a second.
"""

import threading
from collections import deque

from serve_app.protocol.load import ReplicaLoad

WINDOW_S = 30
"""Over which rates and shares of time are taken."""

_MEAN_WEIGHT = 0.05
"""Of the last request, in the mean work of one."""

_LEAST_THROUGHPUT = 0.1
"""Below it something is wrong that no figure mends."""


class _Window:
    """The sum of what was added in the last `WINDOW_S`, in steps of a second."""

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
    """Alone-seconds of work done per busy second, smoothed; 1 while unknown."""

    __slots__ = ("_saved_s", "_took_s")

    def __init__(self) -> None:
        # Sums that forget: of a second that was busy a third is left after WINDOW_S busy ones.
        self._took_s = 0.0
        self._saved_s = 0.0  # by calls that several shared

    def called(self, solo_s: float, seconds: float) -> None:
        """Denoiser calls took so long, and those in them one after the other so long."""
        self._saved_s += solo_s - seconds

    def busy(self, seconds: float) -> None:
        """So much time has passed in which there was work, that of the calls included."""
        fading = max(0.0, 1 - seconds / WINDOW_S)
        self._saved_s *= fading
        self._took_s = self._took_s * fading + seconds

    def value(self) -> float:
        # A second of knowing nothing, so that the first calls do not decide alone. What is not a
        # denoiser call takes each request as long as it would alone.
        took_s = self._took_s + 1.0
        return max(_LEAST_THROUGHPUT, (took_s + self._saved_s) / took_s)


class LoadTracker:
    """Keeps the figures. Times are in seconds on any one clock; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._remaining_s = {False: 0.0, True: 0.0}  # by background
        self._requests = {False: 0, True: 0}
        self._offered = _Window()
        self._busy = _Window()
        self._mean_s = 0.0
        self._counted_until = 0.0
        self._throughput = Throughput()

    def offered(self, now: float, solo_s: float) -> None:
        """An interactive request came for the first time, and could be done in time by somebody."""
        with self._lock:
            self._offered.add(now, solo_s)
            weight = _MEAN_WEIGHT if self._mean_s else 1.0
            self._mean_s += weight * (solo_s - self._mean_s)

    def accepted(self, now: float, solo_s: float, low_priority: bool) -> None:
        """A request was taken in."""
        with self._lock:
            self._pass_to(now)
            self._remaining_s[low_priority] += solo_s
            self._requests[low_priority] += 1

    def called(self, solo_s: float, seconds: float) -> None:
        """A denoiser call took so long, and those in it one after the other so long."""
        with self._lock:
            self._throughput.called(solo_s, seconds)

    def update_remaining(
        self, now: float, before_s: float, left_s: float, low_priority: bool
    ) -> None:
        """Of a request that was taken in so much was left, and is now: more, if it turns out to
        take longer."""
        with self._lock:
            self._pass_to(now)
            self._remaining_s[low_priority] += left_s - before_s

    def ended(self, now: float, left_s: float, low_priority: bool) -> None:
        """A request has ended, with so much of it not done."""
        with self._lock:
            self._pass_to(now)
            self._remaining_s[low_priority] -= left_s
            self._requests[low_priority] -= 1
            if not self._requests[low_priority]:
                self._remaining_s[low_priority] = 0.0  # what rounding left

    def throughput(self) -> float:
        with self._lock:
            return self._throughput.value()

    def backlog_s(self, low_priority: bool = False) -> float:
        """Seconds to finish what was accepted, at the measured throughput."""
        with self._lock:
            return self._backlog_s(low_priority)

    def load(self, now: float) -> ReplicaLoad:
        """All figures."""
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
        """Count the time until now, in which as many requests were there as are."""
        busy_s = max(0.0, now - self._counted_until)  # two threads may come out of order
        self._counted_until += busy_s
        if not any(self._requests.values()):
            return
        if self._requests[False]:
            self._busy.add(now, busy_s)
        self._throughput.busy(busy_s)
