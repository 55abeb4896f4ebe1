"""Deadlines that clients named: which can still be met, and when one of them must run."""

from bisect import bisect_left, insort
from heapq import heappop, heappush

from serve_app.engine.scheduling.queue import QueueEntry

ROUNDING_S = 1e-6
"""Tolerance for sums of times, whose rounding depends on the order of the terms."""

RESERVE = 0.5
"""Slack that is kept for what cannot be predicted, as a share of a request's work."""


class OnTimeSet:
    """The requests with a named deadline, and the largest set of them that can be on time.

    The algorithm is Moore's (1968, "An n job, one machine sequencing algorithm for minimizing the
    number of late jobs"). It goes through the requests in the order of their deadlines. Whenever
    the work up to a deadline exceeds the time to it, the longest request leaves the set. Work
    counts at the rate of the batches in which it will run.

    The longest request is the one with the most total work, not the most remaining work.
    Otherwise a short request would give way to long ones that are nearly done.

    A request that would be late by at most ``grace`` of its own work stays in the set, if it can
    run at once: predictions are not exact.
    """

    def __init__(self, grace: float = 0.5) -> None:
        self._grace = grace
        self._by_deadline: list[tuple[float, int, QueueEntry]] = []
        self._stale = False  # True if the set may have changed

    def add(self, entry: QueueEntry) -> None:
        insort(self._by_deadline, (entry.deadline_at, entry.request, entry))
        self._stale = True

    def drop(self, entry: QueueEntry) -> None:
        del self._by_deadline[bisect_left(self._by_deadline, (entry.deadline_at, entry.request))]
        self._stale = True

    def __bool__(self) -> bool:
        return bool(self._by_deadline)

    def replan(self) -> None:
        """Compute the set anew at the next decision."""
        self._stale = True

    def plan(self, now: float) -> None:
        """Mark the requests outside the set as late, if the set may have changed."""
        if not self._stale:
            return
        self._stale = False
        longest: list[tuple[float, int, float, QueueEntry]] = []
        finished_at = now
        for deadline_at, number, entry in self._by_deadline:
            soonest_at = now + entry.remaining_s
            lost_at = deadline_at + self._grace * entry.total_work_s + ROUNDING_S
            entry.late = soonest_at > lost_at
            if entry.late:
                continue
            takes_s = entry.remaining_s * _share(entry)
            finished_at += takes_s
            heappush(longest, (-entry.total_work_s, number, takes_s, entry))
            while finished_at > max(deadline_at, soonest_at) + ROUNDING_S:
                _, _, saved_s, dropped = heappop(longest)
                finished_at -= saved_s
                dropped.late = True

    def due(self, now: float, call_s: float) -> QueueEntry | None:
        """Return the parked request that must run now; ``None`` if another call may run first.

        The other call may take ``call_s``. It may use half of the slack: the other half is a
        reserve for arrivals that cannot be predicted. So is `RESERVE`, because predictions are not
        exact.
        """
        self.plan(now)
        first: QueueEntry | None = None
        finished_at = now
        due = False
        for deadline_at, _, entry in self._by_deadline:
            if entry.late:
                continue
            finished_at += entry.remaining_s * _share(entry)
            ends_at = max(finished_at, now + entry.remaining_s)
            if ends_at > deadline_at + self._grace * entry.total_work_s + ROUNDING_S:
                self._stale = True  # one of them is lost: the next plan finds out which
            if entry.group is not None and first is None:
                first = entry
            if 2 * call_s > deadline_at - ends_at - RESERVE * entry.total_work_s:
                due = True
                if first is not None:
                    break
        return first if due else None


def _share(entry: QueueEntry) -> float:
    """Return the device's seconds per solo second of the entry's work, as last known."""
    if entry.group is not None and entry.group.batch is not None:
        entry.share = entry.group.batch.share
    return entry.share
