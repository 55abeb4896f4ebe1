"""Which parked calls run next. Pure Python: no torch, no clock of its own, no engine.

The engine tells a policy of every request that comes, parks and goes, and asks it before each
denoiser call. What a decision needs is kept sorted in between, so that it costs microseconds.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, Protocol


@dataclass(eq=False, slots=True)
class QueueEntry:
    """A request as a policy sees it. Times are in seconds, on any one clock."""

    request: int
    """Its number; lower came earlier."""
    deadline_at: float
    remaining_s: float
    """Predicted work from here to its end, alone on the device."""
    key: Hashable = None
    """Of the parked call: equal keys may run together; ``None`` runs alone."""
    step_s: float = 0.0
    """Predicted time of the parked call, alone on the device."""
    turn: int = 0
    """Counts the calls that parked, over all requests."""
    late: bool = False
    """It cannot be done in time any more, or only at the cost of more than one other."""
    total_work_s: float = 0.0
    """The work when it came; a policy sets it."""
    low_priority: bool = False
    """It runs when no other can."""
    _position: tuple[Any, int] | None = field(default=None, repr=False)
    """Where it stands in its group; none while it is not parked."""


ROUNDING_S = 1e-6
"""Sums of times differ by less than this in the order of their terms."""

Cap = Callable[[QueueEntry, float], int]
"""How many calls may run together with, and including, that of a task, in so many seconds."""


class Policy(Protocol):
    """Orders the requests and chooses what runs in the next denoiser call."""

    def add(self, entry: QueueEntry) -> None:
        """A request was accepted, its deadline is set for good. It is not parked yet."""
        ...

    def park(self, entry: QueueEntry) -> None:
        """Its call waits; ``key``, ``remaining_s`` and ``step_s`` are set."""
        ...

    def drop(self, entry: QueueEntry) -> None:
        """The request has ended, wherever it was."""
        ...

    def first(self, entries: list[QueueEntry], now: float) -> QueueEntry:
        """Which of these, none of them parked, goes first."""
        ...

    def order(self, now: float) -> list[QueueEntry]:
        """All requests, parked or not: who goes before whom, as it looks now."""
        ...

    def choose(self, now: float, cap: Cap) -> list[QueueEntry]:
        """Calls that may run together, the leader first; they count as parked no more.

        At least one, if any is parked, and at most the ``cap`` of the leader.
        """
        ...


class RankedPolicy(ABC):
    """The lowest rank leads; those that fit with it follow in the order of their ranks."""

    def __init__(self) -> None:
        self._groups: dict[Hashable, list[tuple[Any, int]]] = {}
        self._entries: dict[int, QueueEntry] = {}
        self._turns = 0

    @abstractmethod
    def rank(self, entry: QueueEntry) -> Any:
        """Lower goes first; ties go to the request that came first."""

    def call_s(self, leader: QueueEntry, now: float) -> float:
        """How many seconds company may make the leader's call take."""
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
        """At most so many of the parked calls with this key; they count as parked no more."""
        if key is None or most <= 0 or key not in self._groups:
            return []
        return self._take(key, 0.0, lambda *_: most)

    @property
    def count(self) -> int:
        """Requests, parked or not."""
        return len(self._entries)

    def _leader(self) -> tuple[Hashable, QueueEntry]:
        """The first of all, and its group."""
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
            entry._position = None
        return chosen

    def _group(self, entry: QueueEntry) -> Hashable:
        return ("alone", entry.request) if entry.key is None else entry.key

    def _enter(self, entry: QueueEntry) -> None:
        entry._position = (self.rank(entry), entry.request)
        insort(self._groups.setdefault(self._group(entry), []), entry._position)

    def _leave(self, entry: QueueEntry) -> None:
        if entry._position is None:
            return
        group = self._group(entry)
        members = self._groups[group]
        del members[bisect_left(members, entry._position)]
        if not members:
            del self._groups[group]
        entry._position = None


class Fifo(RankedPolicy):
    """The call that has waited longest leads: every shape gets its turn, whatever it costs."""

    def rank(self, entry: QueueEntry) -> int:
        return entry.turn


class ShortestFirst(RankedPolicy):
    """The least remaining work leads. Best for the mean, and long requests may starve."""

    def rank(self, entry: QueueEntry) -> float:
        return entry.remaining_s


class LeastSlack(RankedPolicy):
    """The least time to spare leads, also when there is none left: collapses under load."""

    def rank(self, entry: QueueEntry) -> float:
        return entry.deadline_at - entry.remaining_s


class OnTime(RankedPolicy):
    """The earliest deadline leads among the requests that can still be on time.

    Those are the largest set that one device can finish in time: in the order of their deadlines,
    the longest is left out whenever the work up to a deadline is more than the time to it (Moore,
    1968, "An n job, one machine sequencing algorithm for minimizing the number of late jobs").
    The set is made again when a request comes or goes, or a leader turns out to be too late; in
    between, the work that is done and the time that passes keep step.

    The longest by all of its work, not by what is left of it: or a short request would give way to
    long ones that are nearly done. In simulations that costs a deadline in fifty, and halves the
    longest wait of a short request.

    That batches make the device faster is left out of account: what it gains makes up for what
    cannot be foreseen.

    Whoever would be late by a little, up to ``grace`` of its own work, counts as on time if it can
    run at once: predictions are not exact, and nobody loses its place by a few milliseconds. In
    simulations that costs two deadlines in a hundred, and halves the longest wait of a short
    request again.

    The others run when none of those waits, and get ``late_share`` of the time. Whoever has less
    work left goes first there, so that who is a little late is not much later; but nobody waits
    forever: a second of work counts as `PATIENCE` seconds of waiting. A leader gets as much company
    as lets it be on time.
    """

    PATIENCE = 100.0
    PATIENCE_TO_START = 10.0
    """Of a late request among those that wait for a place, on time or not."""

    def __init__(self, late_share: float = 0.1, grace: float = 0.5) -> None:
        super().__init__()
        self._late_share = late_share
        self._grace = grace
        self._owed_s = 0.0
        self._stale = False
        self._by_deadline: list[tuple[float, int, QueueEntry]] = []
        self._late: set[int] = set()

    def rank(self, entry: QueueEntry) -> tuple[bool, float]:
        return (entry.late, self._due_at(entry, self.PATIENCE))

    def _due_at(self, entry: QueueEntry, patience: float) -> float:
        """Its deadline, or, when that is lost, the time until which others go before it."""
        return entry.deadline_at + (patience * entry.remaining_s if entry.late else 0.0)

    def _lost_at(self, entry: QueueEntry) -> float:
        """Whoever would end after this is late."""
        return entry.deadline_at + self._grace * entry.total_work_s

    def call_s(self, leader: QueueEntry, now: float) -> float:
        # Company may use half of the time to spare; the rest is for what is not foreseen.
        if leader.late or not leader.remaining_s:
            return math.inf
        spare = (leader.deadline_at - now) / leader.remaining_s - 1
        return leader.step_s * (1 + max(0.0, spare) / 2)

    def add(self, entry: QueueEntry) -> None:
        super().add(entry)
        entry.total_work_s = entry.remaining_s
        insort(self._by_deadline, (entry.deadline_at, entry.request, entry))
        self._stale = True

    def drop(self, entry: QueueEntry) -> None:
        super().drop(entry)
        del self._by_deadline[bisect_left(self._by_deadline, (entry.deadline_at, entry.request))]
        self._late.discard(entry.request)
        self._stale = True

    def first(self, entries: list[QueueEntry], now: float) -> QueueEntry:
        self._plan(now)
        return min(
            entries, key=lambda entry: (self._due_at(entry, self.PATIENCE_TO_START), entry.request)
        )

    def order(self, now: float) -> list[QueueEntry]:
        self._plan(now)
        return super().order(now)

    def choose(self, now: float, cap: Cap) -> list[QueueEntry]:
        if not self._groups:
            return []
        self._plan(now)
        group, leader = self._leader()
        if not leader.late and now + leader.remaining_s > self._lost_at(leader):
            self._stale = True
            self._plan(now)
            group, leader = self._leader()
        late = self._first_late()
        if late is None:
            return self._take(group, now, cap)
        if leader.late or self._owed_s < late.step_s:
            chosen = self._take(group, now, cap)
            done_s = sum(entry.step_s for entry in chosen if not entry.late)
            self._owed_s += self._late_share * done_s
        else:
            chosen = self._take_late(late, now, cap)
            self._owed_s -= sum(entry.step_s for entry in chosen if entry.late)
        return chosen

    def _plan(self, now: float) -> None:
        if not self._stale:
            return
        self._stale = False
        longest: list[tuple[float, int, float]] = []
        finished_at = now
        late: set[int] = set()
        for deadline_at, number, entry in self._by_deadline:
            soonest_at = now + entry.remaining_s
            if soonest_at > self._lost_at(entry):
                late.add(number)
                continue
            finished_at += entry.remaining_s
            due_at = max(deadline_at, soonest_at)
            heappush(longest, (-entry.total_work_s, number, entry.remaining_s))
            while finished_at > due_at + ROUNDING_S:
                _, dropped, remaining_s = heappop(longest)
                finished_at -= remaining_s
                late.add(dropped)
        for number in late ^ self._late:
            entry = self._entries[number]
            parked = entry._position is not None
            self._leave(entry)
            entry.late = number in late
            if parked:
                self._enter(entry)
        self._late = late

    def _first_late(self) -> QueueEntry | None:
        """The late call whose turn it is."""
        first: tuple[Any, int] | None = None
        for entries in self._groups.values():
            index = bisect_left(entries, ((True,),))
            if index < len(entries) and (first is None or entries[index] < first):
                first = entries[index]
        return None if first is None else self._entries[first[1]]

    def _take_late(self, leader: QueueEntry, now: float, cap: Cap) -> list[QueueEntry]:
        """The late leader, and with it the most urgent of its key."""
        self._leave(leader)
        group = self._group(leader)
        fill = 0 if leader.key is None else cap(leader, math.inf) - 1
        if not fill or group not in self._groups:
            return [leader]
        return [leader, *self._take(group, now, lambda *_: fill)]


class FirstCome(RankedPolicy):
    """Whoever came first leads until it is done."""

    def rank(self, entry: QueueEntry) -> int:
        return entry.request


class Yielding:
    """Two policies in one: the background runs when no call of the foreground waits.

    It gives way at the next step. It may share a call of the foreground only where all of that is
    in the call, which waits for nobody else then, and takes no longer than its leader may: so it
    delays nobody who is not there, and those who are no more than any company does. What the
    foreground plans knows nothing of it. It has what time is left, which may be none.
    """

    def __init__(self, interactive: RankedPolicy) -> None:
        self._interactive = interactive
        self._low_priority = FirstCome()

    def _of(self, entry: QueueEntry) -> RankedPolicy:
        return self._low_priority if entry.low_priority else self._interactive

    def add(self, entry: QueueEntry) -> None:
        self._of(entry).add(entry)

    def park(self, entry: QueueEntry) -> None:
        self._of(entry).park(entry)

    def drop(self, entry: QueueEntry) -> None:
        self._of(entry).drop(entry)

    def first(self, entries: list[QueueEntry], now: float) -> QueueEntry:
        interactive = [entry for entry in entries if not entry.low_priority]
        if interactive:
            return self._interactive.first(interactive, now)
        return self._low_priority.first(entries, now)

    def order(self, now: float) -> list[QueueEntry]:
        return self._interactive.order(now) + self._low_priority.order(now)

    def choose(self, now: float, cap: Cap) -> list[QueueEntry]:
        chosen = self._interactive.choose(now, cap)
        if not chosen:
            return self._low_priority.choose(now, cap)
        if len(chosen) == self._interactive.count and self._low_priority.count:
            leader = chosen[0]
            places = cap(leader, self._interactive.call_s(leader, now)) - len(chosen)
            chosen += self._low_priority.batch_fill(leader.key, places)
        return chosen


POLICIES: dict[str, type[RankedPolicy]] = {
    "on_time": OnTime,
    "fifo": Fifo,
    "least_slack": LeastSlack,
    "shortest_first": ShortestFirst,
}
"""By their names in the config."""
