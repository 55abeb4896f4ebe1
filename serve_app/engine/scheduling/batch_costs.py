"""Costs of denoiser calls by batch size, and the batch size that pays. Pure Python."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

TOLERANCE = 0.01
"""A larger batch must gain more than this share to be worth the longer call."""

NEARLY = 0.1
"""Share of the requests per second that a batch without leftovers may lose."""

_TRIED = 2.0
"""How far beyond the largest known batch an unknown one is tried, as a multiple of it."""


@dataclass(frozen=True)
class BatchCosts:
    """Predicted costs of calls for 1, 2, 3… requests of one kind, up to their batch cap."""

    call_s: Sequence[float]
    """Seconds of a call, with the time of its requests between two calls; 0 while unknown."""
    known: float = math.inf
    """Largest batch that was measured. Larger ones are tried, up to twice this size."""

    @property
    def _limit(self) -> float:
        """Largest batch to run."""
        return max(1, math.floor(_TRIED * self.known)) if math.isfinite(self.known) else math.inf

    @cached_property
    def best(self) -> tuple[int, ...]:
        """Batch size to run for 1, 2, 3… requests that wait: the most requests per second.

        Of sizes that differ by less than `TOLERANCE`, it is the smallest: the shortest call.
        """
        best, most = [], 0.0
        size = 1
        limit = self._limit
        for waiting, call_s in enumerate(self.call_s, start=1):
            # A larger one is tried while the largest known one still gained.
            if not call_s or (self.known < waiting <= limit and size >= math.floor(self.known)):
                size, most = waiting, waiting / call_s if call_s else 0.0
            elif waiting <= limit and waiting / call_s > most * (1 + TOLERANCE):
                size, most = waiting, waiting / call_s
            best.append(size)
        return tuple(best)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Batch size to run for 1, 2, 3… requests that wait: `best`, or all of them.

        The few that `best` leaves over would run in a small batch, after the others. All run
        together if that takes less time, and serves nearly as many requests per second. So equal
        clients wait equally long: of eight, two would else wait for six to end.
        """
        sizes = []
        for waiting, size in enumerate(self.best, start=1):
            left = waiting - size
            if 0 < left < size and waiting <= self._limit:
                together_s = self.call_s[waiting - 1]
                apart_s = self.call_s[size - 1] + self.call_s[left - 1]
                nearly = self.gain(waiting) >= (1 - NEARLY) * self.gain(size)
                if nearly and together_s <= (1 - TOLERANCE) * apart_s:
                    size = waiting
            sizes.append(size)
        return tuple(sizes)

    def size(self, waiting: int) -> int:
        """Return how many of ``waiting`` requests to run in the next call."""
        return self.sizes[min(waiting, len(self.sizes)) - 1]

    def within(self, seconds: float) -> int:
        """Return the largest batch whose call takes no longer than this; at least 1."""
        fitting = (size for size, call_s in enumerate(self.call_s, start=1) if call_s <= seconds)
        return max(fitting, default=1)

    def capped(self, cap: int) -> "BatchCosts":
        """Return the costs of batches up to ``cap``."""
        return self if cap >= len(self.call_s) else BatchCosts(self.call_s[:cap], self.known)

    @cached_property
    def pace(self) -> float:
        """Times as long as alone that a request takes in the slowest batch that runs."""
        return max(map(self.slowdown, set(self.sizes)))

    @cached_property
    def best_gain(self) -> float:
        """Gain of the best batch."""
        return self.gain(self.best[-1])

    def slowdown(self, size: int) -> float:
        """Return how many times as long as alone a call for ``size`` requests takes."""
        alone_s = self.call_s[0]
        return self.call_s[size - 1] / alone_s if alone_s else 1.0

    def gain(self, size: int) -> float:
        """Return how many times as many requests a second a call for ``size`` serves."""
        return size / self.slowdown(size)
