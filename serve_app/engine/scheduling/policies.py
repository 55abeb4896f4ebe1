"""The scheduling policies by name, and low-priority requests beside any of them."""

from serve_app.engine.scheduling.on_time import OnTime
from serve_app.engine.scheduling.queue import Costs, QueueEntry, RankedPolicy


class Fifo(RankedPolicy):
    """Policy in which the call that has waited longest leads, so every shape gets its turn."""

    def rank(self, entry: QueueEntry) -> int:
        return entry.turn


class ShortestFirst(RankedPolicy):
    """Policy in which the least remaining work leads.

    The mean latency is the lowest, but long requests may starve.
    """

    def rank(self, entry: QueueEntry) -> float:
        return entry.remaining_s


class LeastSlack(RankedPolicy):
    """Policy in which the least slack leads, even if it is negative.

    Under overload, nearly all requests miss their deadlines.
    """

    def rank(self, entry: QueueEntry) -> float:
        return entry.deadline_at - entry.remaining_s


class FirstCome(RankedPolicy):
    """Policy in which the earliest request leads until it is done."""

    def rank(self, entry: QueueEntry) -> int:
        return entry.request


class Yielding:
    """Two policies in one: low-priority requests run when no interactive call is parked.

    A low-priority request yields at its next step. It may fill the batch of an interactive call
    only if all interactive requests are in that batch, and only within the time that the leader
    allows for batch fill. So it never delays an interactive request outside the batch, and delays
    those inside no more than any batch fill does. The interactive policy does not know of
    low-priority requests. They get the time that is left, which may be none.
    """

    def __init__(self, interactive: RankedPolicy) -> None:
        self._interactive = interactive
        self._low_priority = FirstCome()

    def _policy_of(self, entry: QueueEntry) -> RankedPolicy:
        return self._low_priority if entry.low_priority else self._interactive

    def add(self, entry: QueueEntry) -> None:
        self._policy_of(entry).add(entry)

    def park(self, entry: QueueEntry) -> None:
        self._policy_of(entry).park(entry)

    def drop(self, entry: QueueEntry) -> None:
        self._policy_of(entry).drop(entry)

    def first(self, entries: list[QueueEntry], now: float) -> QueueEntry:
        interactive = [entry for entry in entries if not entry.low_priority]
        if interactive:
            return self._interactive.first(interactive, now)
        return self._low_priority.first(entries, now)

    def order(self, now: float) -> list[QueueEntry]:
        return self._interactive.order(now) + self._low_priority.order(now)

    def choose(self, now: float, costs: Costs) -> list[QueueEntry]:
        chosen = self._interactive.choose(now, costs)
        if not chosen:
            return self._low_priority.choose(now, costs)
        if len(chosen) == self._interactive.count and self._low_priority.count:
            leader = chosen[0]
            size = costs.batches(leader).size(len(chosen) + self._low_priority.count)
            size = min(size, costs.cap(leader, self._interactive.call_s(leader, now)))
            chosen += self._low_priority.batch_fill(leader.key, size - len(chosen))
        return chosen


POLICIES: dict[str, type[RankedPolicy]] = {
    "on_time": OnTime,
    "fifo": Fifo,
    "least_slack": LeastSlack,
    "shortest_first": ShortestFirst,
}
"""Policies by their names in the config."""


def new_policy(name: str, slo_scale: float) -> RankedPolicy:
    """Return a policy by its name; ``slo_scale`` as in `EngineConfig`."""
    if name == "on_time":
        return OnTime(patience=max(1.0, slo_scale))
    return POLICIES[name]()
