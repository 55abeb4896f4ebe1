"""The default policy fills batches, meets many deadlines, and leaves nobody behind."""

from collections.abc import Callable, Sequence
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serve_app.engine.scheduling.batch_costs import BatchCosts
from serve_app.engine.scheduling.on_time import OnTime
from serve_app.engine.scheduling.policies import POLICIES
from serve_app.engine.scheduling.queue import QueueEntry
from tests.engine.scheduling.simulated_device import (
    FakeCosts,
    FakeJob,
    count_on_time,
    keyed_jobs,
    new,
    numbers,
    run,
)

gains = st.sampled_from([0.0, 0.2, 0.6, 0.95])


def parked(policy: OnTime, entries: Sequence[QueueEntry]) -> OnTime:
    for entry in entries:
        policy.add(entry)
        policy.park(entry)
    return policy


# ---- nobody is left behind -------------------------------------------------------------------


class Recording(OnTime):
    """The policy, and the work that was there when each request came."""

    def __init__(self, patience: float) -> None:
        super().__init__(patience=patience)
        self.ahead_s: dict[int, float] = {}

    def add(self, entry: QueueEntry) -> None:
        self.ahead_s[entry.request] = sum(other.remaining_s for other in self.order(0.0))
        super().add(entry)


def two_sizes(*requests: tuple[float, int, str, float]) -> list[FakeJob]:
    """Return requests of 1 s a step, from arrival, steps, key and scale of the deadline."""
    return [FakeJob(at, steps, 1.0, key, scale) for at, steps, key, scale in requests]


@given(jobs=keyed_jobs, cap=st.integers(1, 6), shared=gains, patience=st.sampled_from([1.0, 3.0]))
@example(
    two_sizes((3, 16, "b", 3), (6, 11, "a", 1), (8, 15, "b", 1), (9, 12, "a", 3), (12, 17, "b", 1)),
    2,
    0.2,
    1.0,
)
def test_no_request_ends_much_later_than_in_a_plain_queue(
    jobs: list[FakeJob], cap: int, shared: float, patience: float
) -> None:
    """The bound is that of the documentation and the docstring of `Patience`."""
    costs, policy = FakeCosts(cap, shared), Recording(patience)
    _, ended = run(policy, jobs, costs)
    by_job = [costs.batches(QueueEntry(0, 0.0, 1.0, step_s=job.step_s)) for job in jobs]
    longest_call_s = max(batches.call_s[-1] for batches in by_job)
    for number, (job, batches) in enumerate(zip(jobs, by_job, strict=True)):
        queue_s = policy.ahead_s[number] + job.solo_s * batches.pace
        assert ended[number] <= job.at + patience * queue_s + longest_call_s + 1e-6


@given(count=st.integers(2, 14), cap=st.integers(1, 6), shared=gains, apart=st.floats(0, 3))
def test_requests_that_are_alike_end_in_the_order_in_which_they_came(
    count: int, cap: int, shared: float, apart: float
) -> None:
    """At no time is a later one more than one step ahead of an earlier one."""
    jobs = [FakeJob(apart * number, 8, 1.0, "alike") for number in range(count)]
    batches, ended = run(OnTime(), jobs, FakeCosts(cap, shared))
    assert ended == sorted(ended)
    done = [0] * count
    for batch in batches:
        for number in batch:
            done[number] += 1
        assert all(done[one] + 1 >= done[one + 1] for one in range(count - 1))


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.9])
def test_identical_clients_in_a_closed_loop_wait_equally_long(shared: float) -> None:
    """Eight clients, each of which sends its next request when it has the answer."""
    latencies, batch_sizes = closed_loop(OnTime(), clients=8, costs=FakeCosts(8, shared))
    middle = sorted(latencies)[len(latencies) // 2]
    assert sorted(latencies)[int(0.95 * len(latencies))] <= 1.5 * middle
    if shared:
        assert sum(batch_sizes) / len(batch_sizes) > 7  # the batches are full


class DemoCosts(FakeCosts):
    """Costs of the demo model on two cores: batches of six serve the most requests per second."""

    def batches(self, entry: QueueEntry) -> BatchCosts:
        return BatchCosts([ms / 35 for ms in (35, 49, 68, 87, 103, 119, 139, 165)])


def test_of_eight_identical_clients_two_do_not_wait_for_the_other_six() -> None:
    latencies, batch_sizes = closed_loop(OnTime(), clients=8, costs=DemoCosts(8))
    assert max(latencies) <= 1.5 * min(latencies)
    assert sum(batch_sizes) / len(batch_sizes) > 7


def closed_loop(
    policy: OnTime, clients: int, costs: FakeCosts, steps: int = 20, count: int = 200
) -> tuple[list[float], list[int]]:
    """Return the latencies of equal requests, and the batch sizes. The start is left out."""
    now, number = 0.0, 0
    entries: dict[int, QueueEntry] = {}
    latencies: list[float] = []
    sizes: list[int] = []
    while len(latencies) < count:
        while len(entries) < clients:
            entry = QueueEntry(number, now + 3 * steps, steps, "k", 1.0, arrived_at=now)
            entries[number] = entry
            policy.add(entry)
            policy.park(entry)
            number += 1
        chosen = policy.choose(now, costs)
        sizes.append(len(chosen))
        now += costs.batches(chosen[0]).call_s[len(chosen) - 1]
        for entry in chosen:
            entry.remaining_s -= 1.0
            if entry.remaining_s > 0.5:
                policy.park(entry)
            else:
                policy.drop(entry)
                del entries[entry.request]
                latencies.append(now - entry.arrived_at)
    return latencies[2 * clients :], sizes


# ---- batches and deadlines -------------------------------------------------------------------


def test_while_nobody_is_late_the_earliest_deadline_leads() -> None:
    entries = [
        QueueEntry(1, deadline_at=30.0, remaining_s=10.0, key="a", step_s=1.0),
        QueueEntry(2, deadline_at=20.0, remaining_s=10.0, key="b", step_s=1.0),
        QueueEntry(3, deadline_at=40.0, remaining_s=10.0, key="b", step_s=1.0),
    ]
    policy = parked(OnTime(), entries)
    assert numbers(policy.choose(0.0, FakeCosts(4, shared=0.5))) == [2, 3]


def test_a_deadline_that_nobody_named_does_not_make_a_batch_smaller() -> None:
    """In a batch of four each takes 3.25 times as long, and all four miss their deadlines."""
    entries = [QueueEntry(n, 30.0, 10.0, "k", 1.0) for n in range(4)]
    assert len(parked(OnTime(), entries).choose(0.0, FakeCosts(4, shared=0.25))) == 4


def test_a_batch_that_gains_nothing_is_not_filled() -> None:
    entries = [QueueEntry(n, 300.0, 10.0, "k", 1.0) for n in range(4)]
    assert len(parked(OnTime(), entries).choose(0.0, FakeCosts(4, shared=0.0))) == 1


def test_under_saturation_the_fullest_batch_runs_until_another_request_would_be_lost() -> None:
    """A late group of four, and one request that could still be on time."""

    def leader(deadline_at: float) -> int:
        late = [QueueEntry(n, -5.0, 10.0, "late", 1.0) for n in range(4)]
        alone = QueueEntry(9, deadline_at, 2.0, "in time", 0.5)
        policy = parked(OnTime(patience=99.0), [*late, alone])
        return policy.choose(0.0, FakeCosts(4, shared=0.5))[0].request

    assert leader(deadline_at=20.0) == 0
    assert leader(deadline_at=4.0) == 9  # 2 s of slack, of which 1 s is a reserve
    assert leader(deadline_at=1.0) == 0  # it is lost in any case


def _poisson(load: float, count: int = 400) -> list[FakeJob]:
    """Return Poisson arrivals in the mix of vLLM-Omni's benchmark.

    Sizes differ in steps and in time per step.
    """
    mix = {
        "512": (20, 0.03, 15),
        "768": (20, 0.06, 25),
        "1024": (20, 0.11, 45),
        "1536": (35, 0.28, 15),
    }
    mean_s = sum(steps * step_s * share for steps, step_s, share in mix.values()) / 100
    rng = Random(1)
    now = 0.0
    jobs = []
    for _ in range(count):
        now += rng.expovariate(load / mean_s)
        [key] = rng.choices(list(mix), [share for *_, share in mix.values()])
        jobs.append(FakeJob(now, mix[key][0], mix[key][1], key))
    return jobs


@pytest.mark.parametrize("load", [0.7, 0.9, 1.1])
def test_the_default_policy_meets_most_deadlines(
    load: float, report: Callable[[str], None]
) -> None:
    """Batches gain nothing here: the hardest case. `tests.benchmarks.policies` has the others."""
    jobs = _poisson(load)
    share = {}
    for name in POLICIES:
        _, ended = run(new(name), jobs, FakeCosts(1))
        share[name] = count_on_time(jobs, ended) / len(jobs)
    report(
        f"simulated, load {load}: on time "
        + ", ".join(f"{name} {value:.0%}" for name, value in share.items())
    )
    assert share["on_time"] >= share["fifo"] + 0.3
    assert share["on_time"] >= share["least_slack"]
