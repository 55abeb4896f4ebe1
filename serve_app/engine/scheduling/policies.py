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
class Task:
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
    background: bool = False
    """It runs when no other can."""
    _entry: tuple[Any, int] | None = field(default=None, repr=False)
    """Where it stands in its group; none while it is not parked."""


ROUNDING_S = 1e-6
"""Sums of times differ by less than this in the order of their terms."""

Cap = Callable[[Task, float], int]
"""How many calls may run together with, and including, that of a task, in so many seconds."""


class Policy(Protocol):
    """Orders the requests and chooses what runs in the next denoiser call."""

    def add(self, task: Task) -> None:
        """A request was accepted, its deadline is set for good. It is not parked yet."""
        ...

    def park(self, task: Task) -> None:
        """Its call waits; ``key``, ``remaining_s`` and ``step_s`` are set."""
        ...

    def drop(self, task: Task) -> None:
        """The request has ended, wherever it was."""
        ...

    def first(self, tasks: list[Task], now: float) -> Task:
        """Which of these, none of them parked, goes first."""
        ...

    def order(self, now: float) -> list[Task]:
        """All requests, parked or not: who goes before whom, as it looks now."""
        ...

    def choose(self, now: float, cap: Cap) -> list[Task]:
        """Calls that may run together, the leader first; they count as parked no more.

        At least one, if any is parked, and at most the ``cap`` of the leader.
        """
        ...


class RankedPolicy(ABC):
    """The lowest rank leads; those that fit with it follow in the order of their ranks."""

    def __init__(self) -> None:
        self._groups: dict[Hashable, list[tuple[Any, int]]] = {}
        self._tasks: dict[int, Task] = {}
        self._turns = 0

    @abstractmethod
    def rank(self, task: Task) -> Any:
        """Lower goes first; ties go to the request that came first."""

    def call_s(self, leader: Task, now: float) -> float:
        """How many seconds company may make the leader's call take."""
        return math.inf

    def add(self, task: Task) -> None:
        self._tasks[task.request] = task

    def park(self, task: Task) -> None:
        self._turns += 1
        task.turn = self._turns
        self._enter(task)

    def drop(self, task: Task) -> None:
        self._leave(task)
        del self._tasks[task.request]

    def first(self, tasks: list[Task], now: float) -> Task:
        return min(tasks, key=lambda task: (self.rank(task), task.request))

    def order(self, now: float) -> list[Task]:
        return sorted(self._tasks.values(), key=lambda task: (self.rank(task), task.request))

    def choose(self, now: float, cap: Cap) -> list[Task]:
        if not self._groups:
            return []
        return self._take(self._leader()[0], now, cap)

    def company(self, key: Hashable, most: int) -> list[Task]:
        """At most so many of the parked calls with this key; they count as parked no more."""
        if key is None or most <= 0 or key not in self._groups:
            return []
        return self._take(key, 0.0, lambda *_: most)

    @property
    def count(self) -> int:
        """Requests, parked or not."""
        return len(self._tasks)

    def _leader(self) -> tuple[Hashable, Task]:
        """The first of all, and its group."""
        group = min(self._groups, key=lambda group: self._groups[group][0])
        return group, self._tasks[self._groups[group][0][1]]

    def _take(self, group: Hashable, now: float, cap: Cap) -> list[Task]:
        entries = self._groups[group]
        leader = self._tasks[entries[0][1]]
        count = 1 if leader.key is None else cap(leader, self.call_s(leader, now))
        chosen = [self._tasks[number] for _, number in entries[:count]]
        if count < len(entries):
            del entries[:count]
        else:
            del self._groups[group]
        for task in chosen:
            task._entry = None
        return chosen

    def _group(self, task: Task) -> Hashable:
        return ("alone", task.request) if task.key is None else task.key

    def _enter(self, task: Task) -> None:
        task._entry = (self.rank(task), task.request)
        insort(self._groups.setdefault(self._group(task), []), task._entry)

    def _leave(self, task: Task) -> None:
        if task._entry is None:
            return
        group = self._group(task)
        entries = self._groups[group]
        del entries[bisect_left(entries, task._entry)]
        if not entries:
            del self._groups[group]
        task._entry = None


class Fifo(RankedPolicy):
    """The call that has waited longest leads: every shape gets its turn, whatever it costs."""

    def rank(self, task: Task) -> int:
        return task.turn


class ShortestFirst(RankedPolicy):
    """The least remaining work leads. Best for the mean, and long requests may starve."""

    def rank(self, task: Task) -> float:
        return task.remaining_s


class LeastSlack(RankedPolicy):
    """The least time to spare leads, also when there is none left: collapses under load."""

    def rank(self, task: Task) -> float:
        return task.deadline_at - task.remaining_s


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
        self._by_deadline: list[tuple[float, int, Task]] = []
        self._late: set[int] = set()

    def rank(self, task: Task) -> tuple[bool, float]:
        return (task.late, self._due_at(task, self.PATIENCE))

    def _due_at(self, task: Task, patience: float) -> float:
        """Its deadline, or, when that is lost, the time until which others go before it."""
        return task.deadline_at + (patience * task.remaining_s if task.late else 0.0)

    def _lost_at(self, task: Task) -> float:
        """Whoever would end after this is late."""
        return task.deadline_at + self._grace * task.total_work_s

    def call_s(self, leader: Task, now: float) -> float:
        # Company may use half of the time to spare; the rest is for what is not foreseen.
        if leader.late or not leader.remaining_s:
            return math.inf
        spare = (leader.deadline_at - now) / leader.remaining_s - 1
        return leader.step_s * (1 + max(0.0, spare) / 2)

    def add(self, task: Task) -> None:
        super().add(task)
        task.total_work_s = task.remaining_s
        insort(self._by_deadline, (task.deadline_at, task.request, task))
        self._stale = True

    def drop(self, task: Task) -> None:
        super().drop(task)
        del self._by_deadline[bisect_left(self._by_deadline, (task.deadline_at, task.request))]
        self._late.discard(task.request)
        self._stale = True

    def first(self, tasks: list[Task], now: float) -> Task:
        self._plan(now)
        return min(
            tasks, key=lambda task: (self._due_at(task, self.PATIENCE_TO_START), task.request)
        )

    def order(self, now: float) -> list[Task]:
        self._plan(now)
        return super().order(now)

    def choose(self, now: float, cap: Cap) -> list[Task]:
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
            done_s = sum(task.step_s for task in chosen if not task.late)
            self._owed_s += self._late_share * done_s
        else:
            chosen = self._take_late(late, now, cap)
            self._owed_s -= sum(task.step_s for task in chosen if task.late)
        return chosen

    def _plan(self, now: float) -> None:
        if not self._stale:
            return
        self._stale = False
        longest: list[tuple[float, int, float]] = []
        finished_at = now
        late: set[int] = set()
        for deadline_at, number, task in self._by_deadline:
            soonest_at = now + task.remaining_s
            if soonest_at > self._lost_at(task):
                late.add(number)
                continue
            finished_at += task.remaining_s
            due_at = max(deadline_at, soonest_at)
            heappush(longest, (-task.total_work_s, number, task.remaining_s))
            while finished_at > due_at + ROUNDING_S:
                _, dropped, remaining_s = heappop(longest)
                finished_at -= remaining_s
                late.add(dropped)
        for number in late ^ self._late:
            task = self._tasks[number]
            parked = task._entry is not None
            self._leave(task)
            task.late = number in late
            if parked:
                self._enter(task)
        self._late = late

    def _first_late(self) -> Task | None:
        """The late call whose turn it is."""
        first: tuple[Any, int] | None = None
        for entries in self._groups.values():
            index = bisect_left(entries, ((True,),))
            if index < len(entries) and (first is None or entries[index] < first):
                first = entries[index]
        return None if first is None else self._tasks[first[1]]

    def _take_late(self, leader: Task, now: float, cap: Cap) -> list[Task]:
        """The late leader, and with it the most urgent of its key."""
        self._leave(leader)
        group = self._group(leader)
        fill = 0 if leader.key is None else cap(leader, math.inf) - 1
        if not fill or group not in self._groups:
            return [leader]
        return [leader, *self._take(group, now, lambda *_: fill)]


class FirstCome(RankedPolicy):
    """Whoever came first leads until it is done."""

    def rank(self, task: Task) -> int:
        return task.request


class Yielding:
    """Two policies in one: the background runs when no call of the foreground waits.

    It gives way at the next step. It may share a call of the foreground only where all of that is
    in the call, which waits for nobody else then, and takes no longer than its leader may: so it
    delays nobody who is not there, and those who are no more than any company does. What the
    foreground plans knows nothing of it. It has what time is left, which may be none.
    """

    def __init__(self, foreground: RankedPolicy) -> None:
        self._foreground = foreground
        self._background = FirstCome()

    def _of(self, task: Task) -> RankedPolicy:
        return self._background if task.background else self._foreground

    def add(self, task: Task) -> None:
        self._of(task).add(task)

    def park(self, task: Task) -> None:
        self._of(task).park(task)

    def drop(self, task: Task) -> None:
        self._of(task).drop(task)

    def first(self, tasks: list[Task], now: float) -> Task:
        foreground = [task for task in tasks if not task.background]
        if foreground:
            return self._foreground.first(foreground, now)
        return self._background.first(tasks, now)

    def order(self, now: float) -> list[Task]:
        return self._foreground.order(now) + self._background.order(now)

    def choose(self, now: float, cap: Cap) -> list[Task]:
        chosen = self._foreground.choose(now, cap)
        if not chosen:
            return self._background.choose(now, cap)
        if len(chosen) == self._foreground.count and self._background.count:
            leader = chosen[0]
            places = cap(leader, self._foreground.call_s(leader, now)) - len(chosen)
            chosen += self._background.company(leader.key, places)
        return chosen


POLICIES: dict[str, type[RankedPolicy]] = {
    "on_time": OnTime,
    "fifo": Fifo,
    "least_slack": LeastSlack,
    "shortest_first": ShortestFirst,
}
"""By their names in the config."""
