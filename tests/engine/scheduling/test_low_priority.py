"""Low-priority requests run only where they delay no interactive request."""

from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.scheduling.policies import POLICIES, Yielding
from serve_app.engine.scheduling.queue import QueueEntry
from tests.engine.scheduling.simulated_device import (
    FakeCosts,
    FakeJob,
    every_policy,
    jobs,
    numbers,
    run,
)


def yielding(name: str, interactive: int, low_priority: int, keys: str = "k") -> Yielding:
    """Return a policy with parked entries; low-priority ones have the higher numbers."""
    policy = Yielding(POLICIES[name]())
    for number in range(interactive + low_priority):
        entry = QueueEntry(number, 100.0, 10.0, keys[number % len(keys)], 1.0)
        entry.low_priority = number >= interactive
        policy.add(entry)
        policy.park(entry)
    return policy


@every_policy
def test_low_priority_runs_when_no_interactive_call_is_parked(name: str) -> None:
    policy = yielding(name, 0, 3)
    assert numbers(policy.choose(0.0, FakeCosts(2, shared=0.6))) == [0, 1]  # the earliest first
    late = QueueEntry(9, -5.0, 10.0, "other", 1.0)
    policy.add(late)
    policy.park(late)
    assert numbers(policy.choose(0.0, FakeCosts(2, shared=0.6))) == [
        9
    ]  # at the next step, even a late one
    assert numbers(policy.choose(0.0, FakeCosts(2, shared=0.6))) == [2]
    assert policy.choose(0.0, FakeCosts(2, shared=0.6)) == []


@every_policy
def test_low_priority_fills_a_batch_of_all_interactive_requests(name: str) -> None:
    policy = yielding(name, 2, 4)
    assert numbers(policy.choose(0.0, FakeCosts(5, shared=0.6))) == [0, 1, 2, 3, 4]
    policy = yielding(name, 2, 2)
    assert numbers(policy.choose(0.0, FakeCosts(2, shared=0.6))) == [0, 1]  # the cap of the leader
    policy = yielding(name, 2, 2, keys="ab")
    assert (
        len(policy.choose(0.0, FakeCosts(5, shared=0.6))) == 1
    )  # another interactive one would wait
    policy = yielding(name, 1, 2, keys="ab")
    assert numbers(policy.choose(0.0, FakeCosts(5, shared=0.6))) == [0, 2]  # of the same key


def test_low_priority_fill_stays_within_the_time_of_the_leader() -> None:
    """The deadline is in 100 s, and the work takes 10 s: the fill may use half of the slack."""
    costs = FakeCosts(8, shared=0.5)  # each request makes the call half a second longer
    assert len(yielding("on_time", 1, 7).choose(70.0, costs)) == 3
    assert len(yielding("on_time", 1, 7).choose(50.0, costs)) == 5
    assert len(yielding("on_time", 1, 7).choose(90.0, costs)) == 1


def test_low_priority_does_not_fill_a_batch_that_gains_nothing() -> None:
    assert len(yielding("on_time", 1, 7).choose(0.0, FakeCosts(8))) == 1


@every_policy
@given(jobs=jobs, share=st.sampled_from([2, 3, 5]))
def test_every_low_priority_step_runs(name: str, jobs: list[FakeJob], share: int) -> None:
    class Mixed(Yielding):
        def add(self, entry: QueueEntry) -> None:
            entry.low_priority = entry.request % share == 0
            super().add(entry)

    batches, _ = run(Mixed(POLICIES[name]()), jobs)
    for number, job in enumerate(jobs):
        assert sum(number in batch for batch in batches) == job.steps


@every_policy
def test_interactive_requests_start_before_low_priority_ones(name: str) -> None:
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
