"""The queue of a scheduling policy: its entries, its interface and its sorted base class.

The engine reports to a policy every request that it accepts, parks or drops, and calls `choose`
before each denoiser call. A policy keeps its entries sorted, so a choice takes microseconds.
Pure Python: no torch, no clock, no engine. Work is measured in solo seconds, as defined in
`serve_app.protocol.load`.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

from serve_app.engine.scheduling.batch_costs import BatchCosts


@dataclass(eq=False, slots=True)
class Group:
    """Parked calls with one merge key. A call without a key is a group of its own."""

    key: Hashable
    ranked: list[tuple[Any, int]] = field(default_factory=list)
    """Rank and number of each request, in the order of their ranks."""
    batch: Any = None
    """What a policy would run of it next; ``None`` after a change. For use by the policy."""


@dataclass(eq=False, slots=True)
class QueueEntry:
    """A request in the queue of a policy. Times are in seconds, on any one clock."""

    request: int
    """Number of the request; lower numbers arrived earlier."""
    deadline_at: float
    """The deadline that the client named, or else the wanted end."""
    remaining_s: float
    """Predicted remaining work, in solo seconds."""
    key: Hashable = None
    """Merge key of the parked call: equal keys may run together; ``None`` runs by itself."""
    step_s: float = 0.0
    """Predicted solo seconds of the parked call."""
    turn: int = 0
    """Sequence number of the parked call, over all requests."""
    named: bool = False
    """True if the client named the deadline."""
    arrived_at: float = 0.0
    late: bool = False
    """True if the request cannot meet its deadline; set by the policy."""
    total_work_s: float = 0.0
    """Predicted work at its arrival, in solo seconds; set by the policy."""
    share: float = 1.0
    """Seconds of the device per solo second of its work; set by the policy."""
    limit_at: float = 0.0
    """Its limit without the time for its own work, see `Patience`; set by the policy."""
    low_priority: bool = False
    """True if the request runs only when no interactive request can; see `Yielding`."""
    group: Group | None = field(default=None, repr=False)
    """Group of its parked call; ``None`` while it is not parked. Set by the policy."""
    position: tuple[Any, int] = field(default=(0, 0), repr=False)
    """Sort key within its group, while it is parked. Set by the policy."""


class Costs(Protocol):
    """Costs of denoiser calls on this device, as a policy needs them."""

    def cap(self, entry: QueueEntry, within_s: float = math.inf) -> int:
        """Return how many calls, that of the entry included, fit in a call of this duration."""
        ...

    def batches(self, entry: QueueEntry) -> BatchCosts:
        """Return the costs of calls for 1, 2, 3… requests like this one."""
        ...


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
        """Return all requests, parked or not, roughly in the order in which they would run."""
        ...

    def choose(self, now: float, costs: Costs) -> list[QueueEntry]:
        """Remove and return the calls of the next batch, the leader first.

        Returns at least one call if any is parked, and at most the cap of the leader.
        """
        ...


class RankedPolicy(ABC):
    """Base of policies in which the lowest rank leads and batch fill follows by rank."""

    def __init__(self) -> None:
        self._groups: dict[Hashable, Group] = {}
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

    def choose(self, now: float, costs: Costs) -> list[QueueEntry]:
        if not self._groups:
            return []
        group = min(self._groups.values(), key=lambda group: group.ranked[0])
        leader = self._entries[group.ranked[0][1]]
        cap = 1 if leader.key is None else costs.cap(leader, self.call_s(leader, now))
        return self._take(group, cap)

    def batch_fill(self, key: Hashable, most: int) -> list[QueueEntry]:
        """Remove and return at most ``most`` parked calls with this key."""
        if key is None or most <= 0 or key not in self._groups:
            return []
        return self._take(self._groups[key], most)

    @property
    def count(self) -> int:
        """Number of requests, parked or not."""
        return len(self._entries)

    def _take(self, group: Group, count: int) -> list[QueueEntry]:
        """Remove and return the first ``count`` calls of a group."""
        chosen = [self._entries[number] for _, number in group.ranked[:count]]
        self._remove(group, chosen)
        return chosen

    def _remove(self, group: Group, chosen: list[QueueEntry]) -> None:
        """Remove calls that run now."""
        ranked = group.ranked
        for entry in chosen:
            del ranked[bisect_left(ranked, entry.position)]
            entry.group = None
        group.batch = None
        if not ranked:
            del self._groups[group.key]

    def _enter(self, entry: QueueEntry) -> None:
        # Merge keys are large: each one is hashed once for each call that parks.
        key = ("unmergeable", entry.request) if entry.key is None else entry.key
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = Group(key)
        entry.group, entry.position = group, (self.rank(entry), entry.request)
        group.batch = None
        insort(group.ranked, entry.position)

    def _leave(self, entry: QueueEntry) -> None:
        if entry.group is not None:
            self._remove(entry.group, [entry])
