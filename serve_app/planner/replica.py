"""One engine in simulated time: its requests, their costs and its running steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.engine.scheduling.batch_costs import BatchCosts
from serve_app.engine.scheduling.cost import CostModel
from serve_app.engine.scheduling.load import Throughput
from serve_app.engine.scheduling.queue import QueueEntry, RankedPolicy
from serve_app.planner.trace import Kind

LEAP_S = 0.5
"""Maximum time of steps taken together, unless a request arrives."""


@dataclass(frozen=True)
class Cost:
    """Precomputed cost of one kind of request."""

    step_s: tuple[float, ...]
    """Time of a step for 1, 2, 3, … requests."""
    leap: int
    """Steps between two decisions of the scheduler."""
    batches: BatchCosts
    """Times of so many steps for 1, 2, 3, … requests."""
    before_s: float
    after_s: float
    solo_s: float


def costs(model: CostModel, kinds: Sequence[Kind]) -> dict[Kind, Cost]:
    """Compute the cost of each kind, as the engine predicts it."""
    found = {}
    for kind in dict.fromkeys(kinds):
        cap = model.cap(kind.size)
        between_s = model.predict_between(kind.size)
        step_s = tuple(
            model.calls_per_step * (model.predict_call(kind.size, rows) + rows * between_s)
            for rows in range(1, cap + 1)
        )
        before_s, after_s = model.predict_encode(kind.size), model.predict_decode(kind.size)
        solo_s = before_s + kind.steps * step_s[0] + after_s
        leap = max(1, int(LEAP_S / step_s[0]))
        batches = BatchCosts([leap * seconds for seconds in step_s])
        found[kind] = Cost(step_s, leap, batches, before_s, after_s, solo_s)
    return found


class SimulatedRequest:
    __slots__ = ("at_s", "cost", "deadline_at", "entry", "kind", "steps_left")

    def __init__(self, at_s: float, kind: Kind, cost: Cost, slo_scale: float, number: int) -> None:
        self.at_s = at_s
        self.kind = kind
        self.cost = cost
        self.deadline_at = at_s + slo_scale * cost.solo_s
        self.steps_left = kind.steps
        self.entry = self._entry(number, at_s)

    def restart(self, now: float) -> None:
        """Start from the beginning after the loss of a replica, with the same deadline."""
        self.steps_left = self.kind.steps
        self.entry = self._entry(self.entry.request, now)

    def _entry(self, number: int, arrived_at: float) -> QueueEntry:
        return QueueEntry(
            number,
            self.deadline_at,
            self.cost.solo_s,
            key=self.kind.size,
            arrived_at=arrived_at,
        )


class SimulatedReplica:
    """One engine in simulated time."""

    __slots__ = (
        "batch", "begins_at", "by_number", "extra_s", "node_at", "policy", "running", "saved_s",
        "step_s", "steps", "throughput", "turn", "waiting", "work_s",
    )  # fmt: skip

    def __init__(self, policy: RankedPolicy, node_at: float = math.inf) -> None:
        self.node_at = node_at
        """Time at which its node is ready; infinite until it has one."""
        self.policy = policy
        self.by_number: dict[int, SimulatedRequest] = {}
        self.waiting: list[SimulatedRequest] = []
        self.running = 0
        self.work_s = 0.0
        """Solo seconds of the accepted requests, updated at the end of the running steps."""
        self.throughput = Throughput()
        self.batch: list[QueueEntry] = []
        self.begins_at = 0.0
        self.steps = 0
        self.step_s = 0.0
        self.saved_s = 0.0
        """Time that each of these steps saves against running its requests in turn."""
        self.extra_s = 0.0
        """Time before the first and after the last of these steps."""
        self.turn = 0
        """Number of the running steps: an end event with another number is obsolete."""

    def backlog_s(self, now: float) -> float:
        """Return the time until its accepted work is done, at its throughput."""
        if not self.batch:
            return 0.0
        pace = 1 + self.saved_s / self.step_s
        left_s = self.work_s - (now - self.begins_at) * pace
        return max(0.0, left_s) / self.throughput.value()

    # ---- costs, for the scheduler ----------------------------------------------------------------

    def cap(self, entry: QueueEntry, within_s: float = math.inf) -> int:
        """Return how many calls, that of the entry included, fit in a call of this duration."""
        batches = self.batches(entry)
        # The entry's call may be the last few steps of a request, and so a shorter one.
        return batches.within(within_s * batches.call_s[0] / entry.step_s)

    def batches(self, entry: QueueEntry) -> BatchCosts:
        """Return the costs of calls for 1, 2, 3, … requests like this one."""
        return self.by_number[entry.request].cost.batches
