"""The largest batch that fits into the memory of a GPU, predicted from smaller batches.

A trial at the end of a card can take a long time, leaves its memory in pieces, and ends in an error
of whichever library asked last. So the start measures small batches, and tries no batch that they
rule out. Batches that were not ruled out may still run out of memory.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TypeVar

from serve_app.engine.device import MemoryMeter

T = TypeVar("T")

MARGIN = 0.1
"""Share of the available memory that stays free, for pieces that nothing fits into."""


def largest_fitting(peaks: Mapping[int, int], available: int) -> int | None:
    """Return the largest batch that is predicted to fit; ``None`` if nothing is known.

    Memory grows by the same amount for each further request, after a fixed part. The steepest
    growth seen counts.

    Args:
        peaks: Bytes that a call took for a while, by batch size.
        available: Bytes that are there for such a call.
    """
    if len(peaks) < 2:
        return None
    sizes = sorted(peaks)
    growth = max(
        (peaks[larger] - peaks[smaller]) / (larger - smaller) for smaller, larger in pairwise(sizes)
    )
    if growth <= 0:
        return None
    most = sizes[-1]
    spare = available * (1 - MARGIN) - peaks[most]
    return max(most, int(most + spare / growth))  # those that were measured did fit


class MemoryTrend:
    """The memory of calls by batch size. Without a meter, as on a CPU, every batch may be tried."""

    def __init__(self, meter: MemoryMeter | None) -> None:
        self._meter = meter
        self._peaks: dict[int, int] = {}

    def run(self, batch: int, call: Callable[[], T]) -> T:
        """Return ``call()``, and note the memory that it took for this batch size."""
        if self._meter is None:
            return call()
        result, peak = self._meter.measure(call)
        self._peaks[batch] = max(peak, self._peaks.get(batch, 0))
        return result

    def fitting(self, batch: int) -> int:
        """Return ``batch``, or a smaller one if that is the largest predicted to fit."""
        if self._meter is None:
            return batch
        most = largest_fitting(self._peaks, self._meter.available())
        return batch if most is None else min(batch, most)
