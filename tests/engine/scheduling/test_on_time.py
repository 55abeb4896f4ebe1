"""The default policy meets as many deadlines as possible, and late requests do not starve."""

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.scheduling.on_time import OnTime
from serve_app.engine.scheduling.policies import POLICIES
from serve_app.engine.scheduling.queue import QueueEntry
from tests.engine.scheduling.simulated_device import FakeJob, count_on_time, jobs, new, run


@given(jobs)
def test_the_on_time_set_runs_by_deadline_and_meets_them_all(jobs: list[FakeJob]) -> None:
    policy = OnTime(grace=0.0)
    entries = [QueueEntry(n, job.deadline_at, job.solo_s, job.key) for n, job in enumerate(jobs)]
    for entry in entries:
        policy.add(entry)
        policy.park(entry)
    leaders = []
    while chosen := policy.choose(0.0, lambda *_: 1):
        leaders += chosen
    deadlines = [entry.deadline_at for entry in leaders if not entry.late]
    assert deadlines == sorted(deadlines)
    finished_at = 0.0
    for entry in sorted(leaders, key=lambda entry: entry.deadline_at):
        if not entry.late:
            finished_at += entry.remaining_s
            assert finished_at <= entry.deadline_at + 1e-9


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=9))
def test_the_on_time_set_is_the_largest_possible(work: list[tuple[int, int]]) -> None:
    """Compares with a search through all sets."""
    policy = OnTime(grace=0.0)
    entries = [QueueEntry(n, deadline, work_s, "k") for n, (work_s, deadline) in enumerate(work)]
    for entry in entries:
        policy.add(entry)
        policy.park(entry)
    policy.choose(0.0, lambda *_: 1)

    def feasible(members: list[tuple[int, int]]) -> bool:
        total = 0
        for work_s, deadline in sorted(members, key=lambda member: member[1]):
            total += work_s
            if total > deadline:
                return False
        return True

    best = max(
        bits.bit_count()
        for bits in range(2 ** len(work))
        if feasible([member for n, member in enumerate(work) if bits >> n & 1])
    )
    assert sum(not entry.late for entry in entries) == best


def test_batch_fill_may_use_half_of_the_slack_of_the_leader() -> None:
    allowed_s: list[float] = []

    def cap(leader: QueueEntry, within_s: float) -> int:
        allowed_s.append(within_s)
        return 1

    policy = OnTime()
    for entry in (
        QueueEntry(1, deadline_at=30.0, remaining_s=10.0, key="k", step_s=0.5),
        QueueEntry(2, deadline_at=5.0, remaining_s=10.0, key="k", step_s=0.5),
    ):
        policy.add(entry)
        policy.park(entry)
    assert [entry.request for entry in policy.choose(10.0, cap)] == [1]
    assert allowed_s.pop() == 0.75  # 10 s of slack in 10 s of work: half as long again
    assert [entry.request for entry in policy.choose(10.0, cap)] == [2]
    assert allowed_s.pop() == float("inf")  # late in any case


def test_a_request_within_its_grace_counts_as_on_time() -> None:
    """A request beyond its grace does not."""

    def order(deadline_at: float) -> list[int]:
        policy = OnTime(late_share=0.0, grace=0.5)
        for entry in (
            QueueEntry(1, deadline_at=deadline_at, remaining_s=10.0, key="a", step_s=1.0),
            QueueEntry(2, deadline_at=30.0, remaining_s=12.0, key="b", step_s=1.0),
        ):
            policy.add(entry)
            policy.park(entry)
        chosen = [policy.choose(0.0, lambda *_: 1), policy.choose(0.0, lambda *_: 1)]
        return [entry.request for batch in chosen for entry in batch]

    assert order(deadline_at=6.0) == [1, 2]
    assert order(deadline_at=4.0) == [2, 1]


@given(jobs)
def test_every_request_that_counts_as_on_time_ends_within_its_grace(
    jobs: list[FakeJob],
) -> None:
    policy = OnTime(grace=0.5)
    for number, job in enumerate(jobs):
        entry = QueueEntry(number, job.deadline_at, job.solo_s, job.key)
        policy.add(entry)
        policy.park(entry)
    now = 0.0
    while chosen := policy.choose(now, lambda *_: 1):
        (entry,) = chosen
        now += entry.remaining_s
        if not entry.late:
            assert now <= entry.deadline_at + 0.5 * entry.total_work_s + 1e-4
        policy.drop(entry)


def test_a_late_request_does_not_starve() -> None:
    """An infeasible request competes with a steady stream of requests that are on time."""
    infeasible = FakeJob(0, 10, 1.0, "large", slo_scale=0.4)
    steady = [FakeJob(0.9 * second, 1, 1.0, "small", slo_scale=400.0) for second in range(400)]
    _, ended = run(OnTime(), [infeasible, *steady], cap=1)
    assert ended[0] < 150  # 10 s of work at 10 % of the time, and some for the start
    _, ended = run(OnTime(late_share=0.0), [infeasible, *steady], cap=1)
    assert ended[0] > 390


def test_a_long_late_request_does_not_starve_among_short_ones() -> None:
    """Less work goes first among late requests, but waiting counts as well."""
    long = FakeJob(0, 10, 0.1, "large", slo_scale=0.1)
    short = [FakeJob(0.05 * number, 1, 0.1, "small", slo_scale=0.1) for number in range(4000)]
    _, ended = run(OnTime(), [long, *short], cap=1)
    assert ended[0] < 250  # of 400 s for all requests
    assert sorted(ended)[:20] == sorted(ended[1:])[:20]


def test_a_late_request_starts_despite_new_arrivals() -> None:
    policy = OnTime()
    late = QueueEntry(0, deadline_at=0.0, remaining_s=5.0)
    policy.add(late)
    started_at = None
    for second in range(1, 200):  # a new request that can be on time, each second
        new = QueueEntry(second, deadline_at=second + 1.0, remaining_s=0.5)
        policy.add(new)
        if policy.first([late, new], float(second)) is late:
            started_at = second
            break
        policy.drop(new)
    assert started_at == 49  # ten times its work, less the deadline of the new request


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
    jobs = _poisson(load)
    share = {}
    for name in POLICIES:
        _, ended = run(new(name), jobs, cap=1)
        share[name] = count_on_time(jobs, ended) / len(jobs)
    report(
        f"simulated, load {load}: on time "
        + ", ".join(f"{name} {value:.0%}" for name, value in share.items())
    )
    assert share["on_time"] >= share["shortest_first"]
    assert share["on_time"] >= share["fifo"] + 0.3
    assert share["on_time"] >= share["least_slack"]
