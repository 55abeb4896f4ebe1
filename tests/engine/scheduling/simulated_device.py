"""A simulated device that runs the calls that a policy chooses, on a clock of its own."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import strategies as st

from serve_app.engine.scheduling.batch_costs import BatchCosts
from serve_app.engine.scheduling.cost import CostModel, Size
from serve_app.engine.scheduling.policies import POLICIES
from serve_app.engine.scheduling.queue import Policy, QueueEntry


@dataclass(frozen=True)
class FakeJob:
    """A request that arrives at ``at`` and needs ``steps`` calls of ``step_s`` each."""

    at: float
    steps: int
    step_s: float
    key: str | None
    slo_scale: float = 3.0

    @property
    def solo_s(self) -> float:
        return self.steps * self.step_s

    @property
    def deadline_at(self) -> float:
        return self.at + self.slo_scale * self.solo_s


jobs = st.lists(
    st.builds(
        FakeJob,
        at=st.floats(0, 20),
        steps=st.integers(1, 12),
        step_s=st.sampled_from([0.1, 0.3, 1.0]),
        key=st.sampled_from(["small", "large", None]),
        slo_scale=st.sampled_from([1.0, 1.5, 3.0, 10.0]),
    ),
    min_size=1,
    max_size=25,
)

_STEP_S = {"small": 0.1, "medium": 0.3, "large": 1.0}

keyed_jobs = st.lists(
    st.builds(
        lambda at, steps, key, slo_scale: FakeJob(at, steps, _STEP_S[key], key, slo_scale),
        at=st.floats(0, 20),
        steps=st.integers(1, 12),
        key=st.sampled_from(list(_STEP_S)),
        slo_scale=st.sampled_from([1.0, 1.5, 3.0, 10.0]),
    ),
    min_size=1,
    max_size=25,
).map(lambda jobs: sorted(jobs, key=lambda job: job.at))
"""Requests in the order of their arrival; equal keys have equal steps."""


@dataclass(frozen=True)
class FakeCosts:
    """Costs of calls up to a batch cap.

    A call for n requests takes as long as ``shared + (1 - shared) * n`` calls alone.
    """

    most: int = 4
    shared: float = 0.0

    def cap(self, entry: QueueEntry, within_s: float = math.inf) -> int:
        return self.batches(entry).within(within_s)

    def batches(self, entry: QueueEntry) -> BatchCosts:
        shared = self.shared
        calls = [shared + (1 - shared) * n for n in range(1, self.most + 1)]
        return BatchCosts([entry.step_s * call for call in calls])


@dataclass(frozen=True)
class MeasuredCosts:
    """The costs of a cost model, for entries whose merge key is their size."""

    cost: CostModel

    def cap(self, entry: QueueEntry, within_s: float = math.inf) -> int:
        return self.cost.cap(_size(entry), 1.0, within_s)

    def batches(self, entry: QueueEntry) -> BatchCosts:
        return self.cost.batches(_size(entry))


def _size(entry: QueueEntry) -> Size:
    assert isinstance(entry.key, tuple)
    width, height = entry.key
    return width, height


every_policy = pytest.mark.parametrize("name", POLICIES)


def run(
    policy: Policy, jobs: list[FakeJob], costs: FakeCosts = FakeCosts()
) -> tuple[list[list[int]], list[float]]:
    """Drive the policy as the engine does; return the batches in order and the end times.

    By default a batch takes as long as its requests in turn: no gain, so that sums stay simple.
    """
    now = 0.0
    arriving = sorted(range(len(jobs)), key=lambda number: jobs[number].at)
    entries: dict[int, QueueEntry] = {}
    steps_left = [job.steps for job in jobs]
    ended = [0.0] * len(jobs)
    batches = []
    while arriving or entries:
        if not entries:
            now = max(now, jobs[arriving[0]].at)
        while arriving and jobs[arriving[0]].at <= now:
            number = arriving.pop(0)
            job = jobs[number]
            entry = QueueEntry(
                number, job.deadline_at, job.solo_s, job.key, job.step_s, arrived_at=job.at
            )
            entries[number] = entry
            policy.add(entry)
            policy.park(entry)
        chosen = policy.choose(now, costs)
        batches.append([entry.request for entry in chosen])
        work_s = sum(entry.step_s for entry in chosen)
        now += work_s * (1 - costs.shared) + costs.shared * chosen[0].step_s
        for entry in chosen:
            steps_left[entry.request] -= 1
            if steps_left[entry.request]:
                entry.remaining_s = steps_left[entry.request] * entry.step_s
                policy.park(entry)
            else:
                policy.drop(entry)
                del entries[entry.request]
                ended[entry.request] = now
    return batches, ended


def count_on_time(jobs: list[FakeJob], ended: list[float]) -> int:
    """Count the requests that ended by their deadlines."""
    return sum(end <= job.deadline_at + 1e-9 for job, end in zip(jobs, ended, strict=True))


def new(name: str) -> Policy:
    """Return a new policy of this name."""
    return POLICIES[name]()


def numbers(entries: list[QueueEntry]) -> list[int]:
    """Return the numbers of the requests."""
    return [entry.request for entry in entries]
