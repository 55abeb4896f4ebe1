"""The default scheduling policy: as many requests on time as one device can finish in time."""

import math
from bisect import bisect_left, insort
from heapq import heappop, heappush
from typing import Any

from serve_app.engine.scheduling.queue import Cap, QueueEntry, RankedPolicy

ROUNDING_S = 1e-6
"""Tolerance for sums of times, whose rounding depends on the order of the terms."""


class OnTime(RankedPolicy):
    """Policy in which the earliest deadline leads among the requests that can meet theirs.

    These requests form the on-time set: the largest set that one device can finish in time. The
    algorithm is Moore's (1968, "An n job, one machine sequencing algorithm for minimizing the
    number of late jobs"). It goes through the requests in the order of their deadlines. Whenever
    the work up to a deadline exceeds the time to it, the longest request leaves the set. The set
    is computed again when a request is added or dropped, or when a leader would be late. In
    between it stays valid: the remaining work falls as fast as the time to the deadlines.

    The longest request is the one with the most total work, not the most remaining work.
    Otherwise a short request would give way to long ones that are nearly done. In simulations
    this loses one deadline in fifty and halves the longest wait of a short request.

    The set ignores that batches make the device faster. That gain makes up for arrivals that
    cannot be predicted.

    A request that would be late by at most ``grace`` of its own work still counts as on time, if
    it can run at once. Predictions are not exact, and a few milliseconds should not cost a
    request its place. In simulations this loses two deadlines in a hundred and halves the longest
    wait of a short request again.

    Late requests, which are outside the set, run when no call of the set is parked; beyond that
    they get ``late_share`` of the time. Among them, less remaining work runs first, so a slightly
    late request does not become very late. None starves: one second of remaining work counts as
    `PATIENCE` seconds of waiting.

    Batch fill may use half of the leader's slack.
    """

    PATIENCE = 100.0
    """Seconds of waiting per solo second of remaining work, among the late requests."""
    PATIENCE_TO_START = 10.0
    """The same for a late request that waits to start, among all requests that wait to start."""

    def __init__(self, late_share: float = 0.1, grace: float = 0.5) -> None:
        super().__init__()
        self._late_share = late_share
        self._grace = grace
        self._owed_s = 0.0  # solo seconds that the late requests may still use
        self._stale = False  # True if the on-time set may have changed
        self._by_deadline: list[tuple[float, int, QueueEntry]] = []
        self._late: set[int] = set()

    def rank(self, entry: QueueEntry) -> tuple[bool, float]:
        return (entry.late, self._due_at(entry, self.PATIENCE))

    def _due_at(self, entry: QueueEntry, patience: float) -> float:
        """Return the deadline, or for a late request the time from which it goes first."""
        return entry.deadline_at + (patience * entry.remaining_s if entry.late else 0.0)

    def _lost_at(self, entry: QueueEntry) -> float:
        """Return the end time after which the request counts as late."""
        return entry.deadline_at + self._grace * entry.total_work_s

    def call_s(self, leader: QueueEntry, now: float) -> float:
        # The other half of the slack is a reserve for arrivals that cannot be predicted.
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
        """Mark the requests outside the on-time set as late, if the set may have changed."""
        if not self._stale:
            return
        self._stale = False
        late = self._outside_on_time_set(now)
        for number in late ^ self._late:
            entry = self._entries[number]
            parked = entry.position is not None
            self._leave(entry)
            entry.late = number in late
            if parked:
                self._enter(entry)
        self._late = late

    def _outside_on_time_set(self, now: float) -> set[int]:
        """Return the numbers of the requests that Moore's algorithm leaves out."""
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
        return late

    def _first_late(self) -> QueueEntry | None:
        """Return the late call that runs first; ``None`` if none is parked."""
        first: tuple[Any, int] | None = None
        for entries in self._groups.values():
            index = bisect_left(entries, ((True,),))
            if index < len(entries) and (first is None or entries[index] < first):
                first = entries[index]
        return None if first is None else self._entries[first[1]]

    def _take_late(self, leader: QueueEntry, now: float, cap: Cap) -> list[QueueEntry]:
        """Remove and return the late leader, filled up with the most urgent calls of its key."""
        self._leave(leader)
        group = self._group(leader)
        fill = 0 if leader.key is None else cap(leader, math.inf) - 1
        if not fill or group not in self._groups:
            return [leader]
        return [leader, *self._take(group, now, lambda *_: fill)]
