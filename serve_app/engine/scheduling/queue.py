"""The queue of a scheduling policy: its entries, its interface and its sorted base class.

The engine reports to a policy every request that it accepts, parks or drops, and calls `choose`
before each denoiser call. A policy keeps its entries sorted, so a choice takes microseconds.
Pure Python: no torch, no clock, no engine. Work is measured in solo seconds, as defined in
`serve_app.protocol.load`.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(eq=False, slots=True)
class QueueEntry:
    """A request in the queue of a policy. Times are in seconds, on any one clock."""

    request: int
    """Number of the request; lower numbers arrived earlier."""
    deadline_at: float
    remaining_s: float
    """Predicted remaining work, in solo seconds."""
    key: Hashable = None
    """Merge key of the parked call: equal keys may run together; ``None`` runs by itself."""
    step_s: float = 0.0
    """Predicted solo seconds of the parked call."""
    turn: int = 0
    """Sequence number of the parked call, over all requests."""
    late: bool = False
    """True if the request is outside the on-time set; see `OnTime`."""
    total_work_s: float = 0.0
    """Predicted work at its arrival, in solo seconds; set by the policy."""
    low_priority: bool = False
    """True if the request runs only when no interactive request can; see `Yielding`."""
    position: tuple[Any, int] | None = field(default=None, repr=False)
    """Sort key within its group; ``None`` while it is not parked. Set by the policy."""


Cap = Callable[[QueueEntry, float], int]
"""Batch cap: the number of calls, that of the entry included, that fit in this many seconds."""


class Policy(Protocol):
    """Order of the requests, and choice of the next denoiser call."""

    def add(self, entry: QueueEntry) -> None:
        """Add an accepted request. Its deadline is final, and it is not parked yet."""
        ...

    def park(self, entry: QueueEntry) -> None:
        """Add the request's call; ``key``, ``remaining_s`` and ``step_s`` must be set."""
        ...

    def drop(self, entry: QueueEntry) -> None:
        """Remove a request that has ended, whether parked or not."""
        ...

    def first(self, entries: list[QueueEntry], now: float) -> QueueEntry:
        """Return the entry to start first, among entries that are not parked."""
        ...

    def order(self, now: float) -> list[QueueEntry]:
        """Return all requests, parked or not, in the order in which they would run now."""
        ...

    def choose(self, now: float, cap: Cap) -> list[QueueEntry]:
        """Remove and return the calls of the next batch, the leader first.

        Returns at least one call if any is parked, and at most ``cap`` of the leader.
        """
        ...


class RankedPolicy(ABC):
    """Base of policies in which the lowest rank leads and batch fill follows by rank."""

    def __init__(self) -> None:
        self._groups: dict[Hashable, list[tuple[Any, int]]] = {}
        self._entries: dict[int, QueueEntry] = {}
        self._turns = 0

    @abstractmethod
    def rank(self, entry: QueueEntry) -> Any:
        """Return the sort key: lower runs first; ties go to the earlier request."""

    def call_s(self, leader: QueueEntry, now: float) -> float:
        """Return the longest time that the leader's call may take with batch fill, in seconds."""
        return math.inf

    def add(self, entry: QueueEntry) -> None:
        self._entries[entry.request] = entry

    def park(self, entry: QueueEntry) -> None:
        self._turns += 1
        entry.turn = self._turns
        self._enter(entry)

    def drop(self, entry: QueueEntry) -> None:
        self._leave(entry)
        del self._entries[entry.request]

    def first(self, entries: list[QueueEntry], now: float) -> QueueEntry:
        return min(entries, key=lambda entry: (self.rank(entry), entry.request))

    def order(self, now: float) -> list[QueueEntry]:
        return sorted(self._entries.values(), key=lambda entry: (self.rank(entry), entry.request))

    def choose(self, now: float, cap: Cap) -> list[QueueEntry]:
        if not self._groups:
            return []
        return self._take(self._leader()[0], now, cap)

    def batch_fill(self, key: Hashable, most: int) -> list[QueueEntry]:
        """Remove and return at most ``most`` parked calls with this key."""
        if key is None or most <= 0 or key not in self._groups:
            return []
        return self._take(key, 0.0, lambda *_: most)

    @property
    def count(self) -> int:
        """Number of requests, parked or not."""
        return len(self._entries)

    def _leader(self) -> tuple[Hashable, QueueEntry]:
        """Return the parked entry of the lowest rank, with its group."""
        group = min(self._groups, key=lambda group: self._groups[group][0])
        return group, self._entries[self._groups[group][0][1]]

    def _take(self, group: Hashable, now: float, cap: Cap) -> list[QueueEntry]:
        members = self._groups[group]
        leader = self._entries[members[0][1]]
        count = 1 if leader.key is None else cap(leader, self.call_s(leader, now))
        chosen = [self._entries[number] for _, number in members[:count]]
        if count < len(members):
            del members[:count]
        else:
            del self._groups[group]
        for entry in chosen:
            entry.position = None
        return chosen

    def _group(self, entry: QueueEntry) -> Hashable:
        return ("unmergeable", entry.request) if entry.key is None else entry.key

    def _enter(self, entry: QueueEntry) -> None:
        entry.position = (self.rank(entry), entry.request)
        insort(self._groups.setdefault(self._group(entry), []), entry.position)

    def _leave(self, entry: QueueEntry) -> None:
        if entry.position is None:
            return
        group = self._group(entry)
        members = self._groups[group]
        del members[bisect_left(members, entry.position)]
        if not members:
            del self._groups[group]
        entry.position = None
