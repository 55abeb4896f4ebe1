"""The data that a frame displays: the last scrape, and rates over the seconds before it."""

from collections import deque
from dataclasses import dataclass

from prometheus_client.metrics import MetricWrapperBase

from serve_app.top.series import Series, added, increases

WINDOW_S = 10.0
"""Time span of rates and quantiles, or one scrape interval if that is longer: few requests end
within a second."""


@dataclass(frozen=True)
class Snapshot:
    """The displayed data: the last scrape, and the increases in the seconds before it."""

    now: Series
    rose: Series
    seconds: float
    """Time of the increases; 0 after the first scrape."""

    def rate(self, metric: MetricWrapperBase, part: str = "", /, **labels: str) -> float | None:
        """Return the rate per second; None before the second scrape."""
        if not self.seconds:
            return None
        return (self.rose.total(metric, part, **labels) or 0.0) / self.seconds

    def mean(self, metric: MetricWrapperBase, /, **labels: str) -> float | None:
        """Return the mean of a histogram's observations; None without any."""
        count = self.rose.total(metric, "_count", **labels)
        return (self.rose.total(metric, "_sum", **labels) or 0.0) / count if count else None


class History:
    """The scrapes of the last seconds."""

    def __init__(self) -> None:
        self._last: tuple[float, Series] | None = None
        self._rises: deque[tuple[float, Series]] = deque()

    def add(self, at_s: float, scrape: Series) -> Snapshot:
        """Add a scrape at a time of a monotonic clock, and return the data to display."""
        if self._last is not None:
            before_s, before = self._last
            self._rises.append((at_s - before_s, increases(before, scrape)))
        self._last = at_s, scrape
        seconds = sum(took_s for took_s, _ in self._rises)
        while self._rises and seconds - self._rises[0][0] >= WINDOW_S:
            seconds -= self._rises.popleft()[0]
        return Snapshot(scrape, added(rise for _, rise in self._rises), seconds)

    def clear(self) -> None:
        """Start again after a gap, so that no rate spans it."""
        self._last = None
        self._rises.clear()
