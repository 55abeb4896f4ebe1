"""The bound on every wait: no request ends much later than in a plain queue."""

import math
from collections.abc import Iterable

from serve_app.engine.scheduling.queue import Group, QueueEntry


class Patience:
    """Guard of the requests that others overtake.

    A request's *limit* is its arrival plus ``factor`` times the time that it would need in a plain
    queue: all work that was here before it, one request at a time, and then its own steps at the
    pace of the slowest batch that runs. The guard reports a request whose limit would pass if one
    more call of others ran first, with the work ahead of it still to be done one request at a time.

    If the reported request's elders run then (`OnTime` does that), every limit holds, as long as
    predictions are exact and a call for several requests takes no longer than their calls in turn.
    Proof: let a request's spare time be the time to its limit, less the work of its elders one at a
    time, less its own work at the pace of the slowest batch. At its arrival this is not negative. A
    call for m of its elders takes at most as long as the work that it takes away. A call that
    includes the request itself takes at most the time that its own step has in the slowest batch.
    Any other call runs only if the spare time covers it. So the spare time never falls below zero,
    and the request ends before its limit, or one call later if a call ran when it arrived.
    """

    def __init__(self, factor: float = 3.0) -> None:
        self._factor = factor
        self._nobody_until = math.inf  # until then, no limit can be in danger

    def add(self, entry: QueueEntry, others: Iterable[QueueEntry]) -> None:
        """Set the entry's limit. ``others`` are the requests that are here."""
        entry.total_work_s = entry.remaining_s
        ahead_s = sum(other.remaining_s for other in others)
        entry.limit_at = entry.arrived_at + self._factor * ahead_s
        latest_at = entry.arrived_at + (self._factor - 1) * (ahead_s + entry.remaining_s)
        self._nobody_until = min(self._nobody_until, latest_at)

    def overtaken(
        self, entries: Iterable[QueueEntry], chosen: Group, size: int, ends_at: float
    ) -> QueueEntry | None:
        """Return the first parked request whose limit does not allow a call until ``ends_at``.

        ``entries`` are all requests in the order of their arrival. The call would run the first
        ``size`` requests of the group ``chosen``. Every group has its batch.
        """
        if ends_at <= self._nobody_until:
            return None
        runs = {number for _, number in chosen.ranked[:size]}
        elders_s, nobody_until, factor = 0.0, math.inf, self._factor
        for entry in entries:
            remaining_s = entry.remaining_s
            group = entry.group
            pace = group.batch.pace if group is not None else 1.0
            own_s = (factor * entry.total_work_s - remaining_s) * pace
            latest_at = entry.limit_at + own_s - elders_s
            if latest_at < ends_at and group is not None and entry.request not in runs:
                return entry
            if latest_at < nobody_until:
                nobody_until = latest_at
            elders_s += remaining_s
        # Work only ever raises these times, so they hold until another request arrives.
        self._nobody_until = nobody_until
        return None
