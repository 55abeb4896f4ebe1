"""The former default policy, to compare the present one with.

It plans with the costs of requests alone, and lets a batch take half of the leader's slack.
"""

import math
from bisect import bisect_left, insort
from heapq import heappop, heappush
from typing import Any

from serve_app.engine.scheduling.on_time_set import ROUNDING_S
from serve_app.engine.scheduling.queue import Costs, Group, QueueEntry, RankedPolicy

PATIENCE, PATIENCE_TO_START = 100.0, 10.0


class FormerOnTime(RankedPolicy):
    """Moore's set of requests on time; a tenth of the time for the others."""

    def __init__(self, late_share: float = 0.1, grace: float = 0.5) -> None:
        super().__init__()
        self._late_share = late_share
        self._grace = grace
        self._owed_s = 0.0
        self._stale = False
        self._by_deadline: list[tuple[float, int, QueueEntry]] = []
        self._late: set[int] = set()

    def rank(self, entry: QueueEntry) -> tuple[bool, float]:
        return (entry.late, self._due_at(entry, PATIENCE))

    def _due_at(self, entry: QueueEntry, patience: float) -> float:
        return entry.deadline_at + (patience * entry.remaining_s if entry.late else 0.0)

    def _lost_at(self, entry: QueueEntry) -> float:
        return entry.deadline_at + self._grace * entry.total_work_s

    def call_s(self, leader: QueueEntry, now: float) -> float:
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
        return min(entries, key=lambda one: (self._due_at(one, PATIENCE_TO_START), one.request))

    def order(self, now: float) -> list[QueueEntry]:
        self._plan(now)
        return super().order(now)

    def choose(self, now: float, costs: Costs) -> list[QueueEntry]:
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
            return self._take(group, costs.cap(leader, self.call_s(leader, now)))
        if leader.late or self._owed_s < late.step_s:
            chosen = self._take(group, costs.cap(leader, self.call_s(leader, now)))
            self._owed_s += self._late_share * sum(one.step_s for one in chosen if not one.late)
        else:
            chosen = self._take_late(late, costs)
            self._owed_s -= sum(entry.step_s for entry in chosen if entry.late)
        return chosen

    def _leader(self) -> tuple[Group, QueueEntry]:
        group = min(self._groups.values(), key=lambda group: group.ranked[0])
        return group, self._entries[group.ranked[0][1]]

    def _plan(self, now: float) -> None:
        if not self._stale:
            return
        self._stale = False
        late = self._outside_on_time_set(now)
        for number in late ^ self._late:
            entry = self._entries[number]
            parked = entry.group is not None
            self._leave(entry)
            entry.late = number in late
            if parked:
                self._enter(entry)
        self._late = late

    def _outside_on_time_set(self, now: float) -> set[int]:
        longest: list[tuple[float, int, float]] = []
        finished_at = now
        late: set[int] = set()
        for deadline_at, number, entry in self._by_deadline:
            soonest_at = now + entry.remaining_s
            if soonest_at > self._lost_at(entry):
                late.add(number)
                continue
            finished_at += entry.remaining_s
            heappush(longest, (-entry.total_work_s, number, entry.remaining_s))
            while finished_at > max(deadline_at, soonest_at) + ROUNDING_S:
                _, dropped, remaining_s = heappop(longest)
                finished_at -= remaining_s
                late.add(dropped)
        return late

    def _first_late(self) -> QueueEntry | None:
        first: tuple[Any, int] | None = None
        for group in self._groups.values():
            index = bisect_left(group.ranked, ((True,),))
            if index < len(group.ranked) and (first is None or group.ranked[index] < first):
                first = group.ranked[index]
        return None if first is None else self._entries[first[1]]

    def _take_late(self, leader: QueueEntry, costs: Costs) -> list[QueueEntry]:
        group = leader.group
        assert group is not None
        self._leave(leader)
        fill = costs.cap(leader, math.inf) - 1
        if not fill or not group.ranked:
            return [leader]
        return [leader, *self._take(group, fill)]
