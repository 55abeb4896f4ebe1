"""The default scheduling policy: full batches, many requests on time, nobody left behind."""

import math
from dataclasses import dataclass

from serve_app.engine.scheduling.batch_costs import BatchCosts
from serve_app.engine.scheduling.on_time_set import RESERVE, OnTimeSet
from serve_app.engine.scheduling.patience import Patience
from serve_app.engine.scheduling.queue import Costs, Group, QueueEntry, RankedPolicy

FULL = 0.9
"""Share of the best gain from which a batch counts as full."""


@dataclass(slots=True)
class _Batch:
    """What a group would run next: its earliest deadlines, as many as gain from each other."""

    size: int
    costs: BatchCosts
    call_s: float
    pace: float
    """Times as long as alone that its requests take in a full batch."""
    share: float
    """Seconds of the device per solo second of work."""
    first_at: float
    """Its earliest deadline."""
    lost_at: float
    """Time at which the first of its requests in time is lost, if another call still runs."""
    slack_until: float
    """The same, less a reserve."""
    rate: float
    """Requests that it finishes per second, if it runs to its end."""
    fill: float
    """Share of the group's best gain that it reaches."""


class OnTime(RankedPolicy):
    """Policy that weighs deadlines against what a batch gains.

    Requests with the same merge key form a group. Within a group the earliest deadline goes first,
    so requests that are alike end in the order in which they came. A batch has the size that
    serves the most requests per second, and leaves few over (`BatchCosts.sizes`).

    Which group runs its batch now, from the strongest rule to the weakest:

    1. The group of a deadline that a client named, if one more call could break it (`OnTimeSet`).
       While that blocks rule 2, the requests of rule 2 keep ``late_share`` of the time.
    2. The elders of a request that would else wait much longer than in a plain queue (`Patience`).
    3. While nobody is late: the group of the earliest deadline.
    4. Once somebody is late, the device is saturated. A group goes first if one more call of others
       would make a request of its batch late. Of several, the one that finishes the most requests
       per second: the rule of Smith (1956, "Various optimizers for single-stage production"), with
       batches.
    5. Without such a group, throughput decides: the group whose batch is the fullest, up to
       `FULL`, and of those again the one that finishes the most requests per second.
    """

    def __init__(self, late_share: float = 0.1, patience: float = 3.0, grace: float = 0.5) -> None:
        super().__init__()
        self._late_share = late_share
        self._owed_s = 0.0  # time that overtaken requests may still use
        self._patience = Patience(patience)
        self._on_time_set = OnTimeSet(grace)
        self._nobody_late_until = math.inf

    def rank(self, entry: QueueEntry) -> float:
        return entry.deadline_at

    def call_s(self, leader: QueueEntry, now: float) -> float:
        # The other half of the slack is a reserve for arrivals that cannot be predicted.
        if leader.late or not leader.remaining_s:
            return math.inf
        spare = (leader.deadline_at - now) / leader.remaining_s - 1
        return leader.step_s * (1 + max(0.0, spare) / 2)

    def add(self, entry: QueueEntry) -> None:
        self._patience.add(entry, self._entries.values())
        super().add(entry)
        late_from = entry.deadline_at - entry.remaining_s
        self._nobody_late_until = min(self._nobody_late_until, late_from)
        if entry.named:
            self._on_time_set.add(entry)

    def park(self, entry: QueueEntry) -> None:
        if entry.named and not entry.turn:
            self._on_time_set.replan()  # its group is known now, and with it what a batch gains
        super().park(entry)

    def drop(self, entry: QueueEntry) -> None:
        super().drop(entry)
        if entry.named:
            self._on_time_set.drop(entry)

    def first(self, entries: list[QueueEntry], now: float) -> QueueEntry:
        # Late ones too by deadline: a stream of new requests would keep them waiting for ever.
        return min(entries, key=lambda entry: (entry.deadline_at, entry.request))

    def order(self, now: float) -> list[QueueEntry]:
        self._mark_late(now)
        return sorted(
            self._entries.values(), key=lambda one: (one.late, one.deadline_at, one.request)
        )

    def choose(self, now: float, costs: Costs) -> list[QueueEntry]:
        if not self._groups:
            return []
        groups = list(self._groups.values())
        for group in groups:
            known = self._costs(group, costs)
            if (batch := group.batch) is None or now > batch.lost_at or batch.costs is not known:
                group.batch = self._batch(group, now, known)
        longest_s = max(group.batch.call_s for group in groups)
        group = self._preferred(groups, now, longest_s)
        overtaken = self._patience.overtaken(
            self._entries.values(), group, group.batch.size, now + group.batch.call_s
        )
        if overtaken is not None:
            # The call for its elders may be a longer one, so look again for whom that is too long.
            # It need not include the requests of the preferred batch either.
            overtaken = self._patience.overtaken(self._entries.values(), group, 0, now + longest_s)
            assert overtaken is not None
            chosen = self._elders(overtaken)
        else:
            chosen = [self._entries[number] for _, number in group.ranked[: group.batch.size]]
        if self._on_time_set:
            chosen = self._meet_named_deadlines(chosen, overtaken is not None, now, costs)
        assert chosen[0].group is not None
        self._remove(chosen[0].group, chosen)
        return chosen

    # ---- the rules -------------------------------------------------------------------------------

    def _costs(self, group: Group, costs: Costs) -> BatchCosts:
        leader = self._entries[group.ranked[0][1]]
        if leader.key is not None:
            return costs.batches(leader)
        if group.batch is not None:
            alone: BatchCosts = group.batch.costs
            return alone
        return BatchCosts((leader.step_s,))

    def _batch(self, group: Group, now: float, costs: BatchCosts) -> _Batch:
        entries, ranked = self._entries, group.ranked
        size = costs.size(len(ranked))
        slowdown = costs.slowdown(size)
        work_s, lost_at, slack_until = 0.0, math.inf, math.inf
        for _, number in ranked[:size]:
            entry = entries[number]
            work_s += entry.remaining_s
            at = entry.deadline_at - entry.remaining_s * slowdown
            if at >= now:  # it is in time, if this batch runs to its end
                lost_at = min(lost_at, at)
                slack_until = min(slack_until, at - RESERVE * entry.total_work_s)
        gain = costs.gain(size)
        return _Batch(
            size,
            costs,
            costs.call_s[size - 1],
            costs.pace,
            share=1 / gain,
            first_at=entries[ranked[0][1]].deadline_at,
            lost_at=lost_at,
            slack_until=slack_until,
            rate=size * size / (work_s * slowdown) if work_s else math.inf,
            fill=gain / costs.best_gain,
        )

    def _preferred(self, groups: list[Group], now: float, longest_s: float) -> Group:
        """Return the group to run, apart from the bound on waits and from named deadlines."""
        if not self._somebody_is_late(now):
            return min(groups, key=lambda group: group.batch.first_at)
        ends_at = now + longest_s
        urgent = [group for group in groups if group.batch.slack_until < ends_at]
        if urgent:
            return max(urgent, key=lambda group: group.batch.rate)
        return max(groups, key=lambda group: (min(group.batch.fill, FULL), group.batch.rate))

    def _elders(self, overtaken: QueueEntry) -> list[QueueEntry]:
        """Return calls that came before the overtaken one or are it, and fill that costs nothing.

        The call must not take longer than those of the elders in turn: see `Patience`.
        """
        parked = [entry for entry in self._entries.values() if entry.group is not None]
        group = parked[0].group
        assert group is not None
        costs, size = group.batch.costs, group.batch.size
        elders = parked[: parked.index(overtaken) + 1]
        chosen = [entry for entry in elders if entry.group is group][:size]
        allowed_s = len(chosen) * costs.call_s[0]
        while size > len(chosen) and costs.call_s[size - 1] > allowed_s:
            size -= 1
        return self._filled(group, chosen, size)

    def _meet_named_deadlines(
        self, chosen: list[QueueEntry], overtaken: bool, now: float, costs: Costs
    ) -> list[QueueEntry]:
        """Return the calls that a named deadline needs now, or else ``chosen``."""
        own = chosen[0].group
        assert own is not None
        call_s = own.batch.costs.call_s[len(chosen) - 1]
        leader = self._on_time_set.due(now, call_s)
        if leader is None:
            return chosen
        if overtaken and self._owed_s >= call_s:
            self._owed_s -= call_s
            return chosen
        group = leader.group
        assert group is not None
        size = min(group.batch.size, costs.cap(leader, self.call_s(leader, now)))
        if overtaken:
            self._owed_s += self._late_share * group.batch.costs.call_s[size - 1]
        return self._filled(group, [leader], size)

    def _filled(self, group: Group, chosen: list[QueueEntry], size: int) -> list[QueueEntry]:
        """Return ``chosen`` and as many more of the group as make ``size``."""
        numbers = {entry.request for entry in chosen}
        for _, number in group.ranked:
            if len(chosen) >= size:
                break
            if number not in numbers:
                chosen.append(self._entries[number])
        return chosen

    # ---- who is late -----------------------------------------------------------------------------

    def _somebody_is_late(self, now: float) -> bool:
        if now <= self._nobody_late_until:
            return False
        until = math.inf
        for entry in self._entries.values():
            late_from = entry.deadline_at - entry.remaining_s
            if late_from < now:
                return True
            until = min(until, late_from)
        # Work only ever raises these times, so they hold until another request arrives.
        self._nobody_late_until = until
        return False

    def _mark_late(self, now: float) -> None:
        """Mark the requests that named no deadline. `OnTimeSet` marks the others."""
        for entry in self._entries.values():
            if not entry.named:
                entry.late = now + entry.remaining_s > entry.deadline_at
