"""The policies, on a clock and a device of their own: nothing lost, twice done, or starved."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.scheduling.policies import (
    POLICIES,
    Fifo,
    LeastSlack,
    OnTime,
    Policy,
    QueueEntry,
    ShortestFirst,
    Yielding,
)


@dataclass(frozen=True)
class Job:
    """A request that comes at ``at`` and needs ``steps`` calls of ``step_s`` each."""

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
        Job,
        at=st.floats(0, 20),
        steps=st.integers(1, 12),
        step_s=st.sampled_from([0.1, 0.3, 1.0]),
        key=st.sampled_from(["small", "large", None]),
        slo_scale=st.sampled_from([1.0, 1.5, 3.0, 10.0]),
    ),
    min_size=1,
    max_size=25,
)
policies = pytest.mark.parametrize("name", POLICIES)


def run(policy: Policy, jobs: list[Job], cap: int = 4) -> tuple[list[list[int]], list[float]]:
    """Drive the policy as the engine does; the batches in order, and when each request ended.

    A batch takes as long as its members would one after another: no gain, to keep sums simple.
    """
    now = 0.0
    coming = sorted(range(len(jobs)), key=lambda number: jobs[number].at)
    entries: dict[int, QueueEntry] = {}
    left = [job.steps for job in jobs]
    ended = [0.0] * len(jobs)
    batches = []
    while coming or entries:
        if not entries:
            now = max(now, jobs[coming[0]].at)
        while coming and jobs[coming[0]].at <= now:
            number = coming.pop(0)
            job = jobs[number]
            entry = QueueEntry(number, job.deadline_at, job.solo_s, job.key, job.step_s)
            entries[number] = entry
            policy.add(entry)
            policy.park(entry)
        chosen = policy.choose(now, lambda *_: cap)
        batches.append([entry.request for entry in chosen])
        for entry in chosen:
            now += entry.step_s
        for entry in chosen:
            left[entry.request] -= 1
            if left[entry.request]:
                entry.remaining_s = left[entry.request] * entry.step_s
                policy.park(entry)
            else:
                policy.drop(entry)
                del entries[entry.request]
                ended[entry.request] = now
    return batches, ended


def on_time(jobs: list[Job], ended: list[float]) -> int:
    return sum(end <= job.deadline_at + 1e-9 for job, end in zip(jobs, ended, strict=True))


def new(name: str) -> Policy:
    return POLICIES[name]()


@policies
@given(jobs=jobs, cap=st.integers(1, 5))
def test_every_step_is_run_once_in_batches_that_fit(name: str, jobs: list[Job], cap: int) -> None:
    batches, _ = run(new(name), jobs, cap)
    for batch in batches:
        assert 1 <= len(set(batch)) == len(batch) <= cap
        keys = {jobs[number].key for number in batch}
        assert len(keys) == 1
        assert keys != {None} or len(batch) == 1
    for number, job in enumerate(jobs):
        assert sum(number in batch for batch in batches) == job.steps


@policies
@given(jobs=jobs, dropped=st.integers(0, 24))
def test_a_request_that_is_dropped_is_gone(name: str, jobs: list[Job], dropped: int) -> None:
    policy = new(name)
    entries = [QueueEntry(n, job.deadline_at, job.solo_s, job.key) for n, job in enumerate(jobs)]
    for entry in entries:
        policy.add(entry)
        policy.park(entry)
    gone = entries[dropped % len(entries)]
    policy.drop(gone)
    seen: list[QueueEntry] = []
    while chosen := policy.choose(0.0, lambda *_: 3):
        seen += chosen
    assert sorted(entry.request for entry in seen) == [
        entry.request for entry in entries if entry is not gone
    ]


@policies
@given(jobs=jobs)
def test_the_batch_of_the_leader_is_filled(name: str, jobs: list[Job]) -> None:
    policy = new(name)
    for number, job in enumerate(jobs):
        entry = QueueEntry(number, job.deadline_at, job.solo_s, job.key)
        policy.add(entry)
        policy.park(entry)
    chosen = policy.choose(0.0, lambda *_: 4)
    key = chosen[0].key
    assert len(chosen) == (1 if key is None else min(4, sum(job.key == key for job in jobs)))


def test_fifo_gives_every_shape_its_turn() -> None:
    jobs = [Job(0, 6, 1.0, "large"), Job(0, 6, 1.0, "small"), Job(0, 6, 1.0, "large")]
    batches, _ = run(Fifo(), jobs)
    assert batches[:4] == [[0, 2], [1], [0, 2], [1]]


def test_a_short_urgent_request_overtakes_a_long_one_in_its_middle() -> None:
    jobs = [Job(0, 20, 1.0, "large"), Job(5, 2, 0.5, "small")]
    for policy in (OnTime(), LeastSlack(), ShortestFirst()):
        batches, ended = run(policy, jobs)
        assert batches[5:8] == [[1], [1], [0]], policy
        assert ended[1] == 6.0


@given(jobs)
def test_in_the_on_time_set_deadlines_are_in_order(jobs: list[Job]) -> None:
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
    # The set can be done in time: the whole point of it.
    finished_at = 0.0
    for entry in sorted(leaders, key=lambda entry: entry.deadline_at):
        if not entry.late:
            finished_at += entry.remaining_s
            assert finished_at <= entry.deadline_at + 1e-9


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=9))
def test_no_larger_set_can_be_on_time(work: list[tuple[int, int]]) -> None:
    """Against trying them all."""
    policy = OnTime(grace=0.0)
    entries = [QueueEntry(n, deadline, alone, "k") for n, (alone, deadline) in enumerate(work)]
    for entry in entries:
        policy.add(entry)
        policy.park(entry)
    policy.choose(0.0, lambda *_: 1)

    def feasible(members: list[tuple[int, int]]) -> bool:
        total = 0
        for alone, deadline in sorted(members, key=lambda member: member[1]):
            total += alone
            if total > deadline:
                return False
        return True

    best = max(
        bits.bit_count()
        for bits in range(2 ** len(work))
        if feasible([member for n, member in enumerate(work) if bits >> n & 1])
    )
    assert sum(not entry.late for entry in entries) == best


def test_a_leader_gets_as_much_batch_as_lets_it_be_on_time() -> None:
    asked: list[float] = []

    def cap(leader: QueueEntry, within_s: float) -> int:
        asked.append(within_s)
        return 1

    policy = OnTime()
    for entry in (
        QueueEntry(1, deadline_at=30.0, remaining_s=10.0, key="k", step_s=0.5),
        QueueEntry(2, deadline_at=5.0, remaining_s=10.0, key="k", step_s=0.5),
    ):
        policy.add(entry)
        policy.park(entry)
    assert [entry.request for entry in policy.choose(10.0, cap)] == [1]
    assert asked.pop() == 0.75  # 10 s to spare in 10 s of work: half as long again
    assert [entry.request for entry in policy.choose(10.0, cap)] == [2]
    assert asked.pop() == float("inf")  # late anyway


def test_who_is_late_by_a_little_keeps_its_place() -> None:
    """And whoever would be late by much does not."""

    def ran(deadline_at: float) -> list[int]:
        policy = OnTime(late_share=0.0, grace=0.5)
        for entry in (
            QueueEntry(1, deadline_at=deadline_at, remaining_s=10.0, key="a", step_s=1.0),
            QueueEntry(2, deadline_at=30.0, remaining_s=12.0, key="b", step_s=1.0),
        ):
            policy.add(entry)
            policy.park(entry)
        chosen = [policy.choose(0.0, lambda *_: 1), policy.choose(0.0, lambda *_: 1)]
        return [entry.request for batch in chosen for entry in batch]

    assert ran(deadline_at=6.0) == [1, 2]
    assert ran(deadline_at=4.0) == [2, 1]


@given(jobs)
def test_with_a_grace_no_other_loses_its_deadline_unplanned(jobs: list[Job]) -> None:
    """All that counts as on time ends in time, or by its grace at the latest."""
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


def test_the_late_do_not_starve() -> None:
    """A hopeless request among ever new ones that are on time, which leave no idle moment."""
    infeasible = Job(0, 10, 1.0, "large", slo_scale=0.4)
    steady = [Job(0.9 * second, 1, 1.0, "small", slo_scale=400.0) for second in range(400)]
    _, ended = run(OnTime(), [infeasible, *steady], cap=1)
    assert ended[0] < 150  # 10 s of work at 10 % of the time, and a little for the start
    _, ended = run(OnTime(late_share=0.0), [infeasible, *steady], cap=1)
    assert ended[0] > 390


def test_a_long_late_request_does_not_starve_among_short_ones() -> None:
    """Less work goes first among the late, but waiting counts as well."""
    long = Job(0, 10, 0.1, "large", slo_scale=0.1)
    short = [Job(0.05 * number, 1, 0.1, "small", slo_scale=0.1) for number in range(4000)]
    _, ended = run(OnTime(), [long, *short], cap=1)
    assert ended[0] < 250  # of the 400 s that all of it takes
    assert sorted(ended)[:20] == sorted(ended[1:])[:20]


def test_a_late_request_is_started_among_ever_new_ones() -> None:
    policy = OnTime()
    late = QueueEntry(0, deadline_at=0.0, remaining_s=5.0)
    policy.add(late)
    started_at = None
    for second in range(1, 200):  # another comes whenever there is a place, and can be on time
        new = QueueEntry(second, deadline_at=second + 1.0, remaining_s=0.5)
        policy.add(new)
        if policy.first([late, new], float(second)) is late:
            started_at = second
            break
        policy.drop(new)
    assert started_at == 49  # its deadline, and ten times its work


def _poisson(load: float, count: int = 400) -> list[Job]:
    """The mix that vLLM-Omni measures with; sizes differ in steps and in time per step."""
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
        jobs.append(Job(now, mix[key][0], mix[key][1], key))
    return jobs


@pytest.mark.parametrize("load", [0.7, 0.9, 1.1])
def test_the_on_time_set_meets_more_deadlines(load: float, report: Callable[[str], None]) -> None:
    jobs = _poisson(load)
    share = {}
    for name in POLICIES:
        _, ended = run(new(name), jobs, cap=1)
        share[name] = on_time(jobs, ended) / len(jobs)
    report(
        f"simulated, load {load}: in time "
        + ", ".join(f"{name} {value:.0%}" for name, value in share.items())
    )
    assert share["on_time"] >= share["shortest_first"]
    assert share["on_time"] >= share["fifo"] + 0.3
    assert share["on_time"] >= share["least_slack"]


def yielding(name: str, interactive: int, low_priority: int, keys: str = "k") -> Yielding:
    """All of them parked; those of the background have the higher numbers."""
    policy = Yielding(POLICIES[name]())
    for number in range(interactive + low_priority):
        entry = QueueEntry(number, 100.0, 10.0, keys[number % len(keys)], 1.0)
        entry.low_priority = number >= interactive
        policy.add(entry)
        policy.park(entry)
    return policy


def numbers(entries: list[QueueEntry]) -> list[int]:
    return [entry.request for entry in entries]


@policies
def test_the_background_runs_when_nobody_else_can(name: str) -> None:
    policy = yielding(name, 0, 3)
    assert numbers(policy.choose(0.0, lambda *_: 2)) == [0, 1]  # whoever came first
    late = QueueEntry(9, -5.0, 10.0, "other", 1.0)
    policy.add(late)
    policy.park(late)
    assert numbers(policy.choose(0.0, lambda *_: 2)) == [9]  # at the next step, however late
    assert numbers(policy.choose(0.0, lambda *_: 2)) == [2]
    assert policy.choose(0.0, lambda *_: 2) == []


@policies
def test_the_background_fills_a_call_that_everybody_else_is_in(name: str) -> None:
    policy = yielding(name, 2, 4)
    assert numbers(policy.choose(0.0, lambda *_: 5)) == [0, 1, 2, 3, 4]
    policy = yielding(name, 2, 2)
    assert numbers(policy.choose(0.0, lambda *_: 2)) == [0, 1]  # as much as its leader may have
    policy = yielding(name, 2, 2, keys="ab")
    assert len(policy.choose(0.0, lambda *_: 5)) == 1  # another would wait for it
    policy = yielding(name, 1, 2, keys="ab")
    assert numbers(policy.choose(0.0, lambda *_: 5)) == [0, 2]  # of the same shape


def test_batch_from_the_background_keeps_to_what_the_leader_may_have() -> None:
    asked: list[float] = []

    def cap(leader: QueueEntry, within_s: float) -> int:
        asked.append(within_s)
        return 2

    yielding("on_time", 1, 1).choose(70.0, cap)
    assert asked == [2.0, 2.0]  # 30 s for 10 s of work: half of the time to spare


@policies
@given(jobs=jobs, share=st.sampled_from([2, 3, 5]))
def test_none_of_the_background_is_lost(name: str, jobs: list[Job], share: int) -> None:
    class Mixed(Yielding):
        def add(self, entry: QueueEntry) -> None:
            entry.low_priority = entry.request % share == 0
            super().add(entry)

    batches, _ = run(Mixed(POLICIES[name]()), jobs)
    for number, job in enumerate(jobs):
        assert sum(number in batch for batch in batches) == job.steps


@policies
def test_who_waits_for_a_place_goes_before_the_background(name: str) -> None:
    policy = Yielding(POLICIES[name]())
    entries = [
        QueueEntry(0, 1.0, 1.0, low_priority=True),
        QueueEntry(1, 99.0, 9.0),
        QueueEntry(2, 1.0, 1.0),
    ]
    entries[2].low_priority = True
    for entry in entries:
        policy.add(entry)
    assert policy.first(entries, 0.0) is entries[1]
    assert numbers(policy.order(0.0)) == [1, 0, 2]
    policy.drop(entries[1])
    assert policy.first([entries[2], entries[0]], 0.0) is entries[0]
