"""Every policy runs every step of every request exactly once."""

from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.scheduling.on_time import OnTime
from serve_app.engine.scheduling.policies import Fifo, LeastSlack, ShortestFirst
from serve_app.engine.scheduling.queue import QueueEntry
from tests.engine.scheduling.simulated_device import (
    FakeCosts,
    FakeJob,
    every_policy,
    jobs,
    keyed_jobs,
    new,
    run,
)


@every_policy
@given(jobs=jobs, cap=st.integers(1, 5), shared=st.sampled_from([0.0, 0.6]))
def test_every_step_runs_once_within_the_cap(
    name: str, jobs: list[FakeJob], cap: int, shared: float
) -> None:
    batches, _ = run(new(name), jobs, FakeCosts(cap, shared))
    for batch in batches:
        assert 1 <= len(set(batch)) == len(batch) <= cap
        keys = {jobs[number].key for number in batch}
        assert len(keys) == 1
        assert keys != {None} or len(batch) == 1
    for number, job in enumerate(jobs):
        assert sum(number in batch for batch in batches) == job.steps


@every_policy
@given(jobs=jobs, dropped=st.integers(0, 24))
def test_a_dropped_request_never_runs(name: str, jobs: list[FakeJob], dropped: int) -> None:
    policy = new(name)
    entries = [QueueEntry(n, job.deadline_at, job.solo_s, job.key) for n, job in enumerate(jobs)]
    for entry in entries:
        policy.add(entry)
        policy.park(entry)
    gone = entries[dropped % len(entries)]
    policy.drop(gone)
    seen: list[QueueEntry] = []
    while chosen := policy.choose(0.0, FakeCosts(3)):
        seen += chosen
    assert sorted(entry.request for entry in seen) == [
        entry.request for entry in entries if entry is not gone
    ]


@every_policy
@given(jobs=keyed_jobs)
def test_the_batch_is_filled_with_calls_of_the_same_key(name: str, jobs: list[FakeJob]) -> None:
    policy = OnTime(patience=1000.0) if name == "on_time" else new(name)  # nobody is overtaken
    for number, job in enumerate(jobs):
        entry = QueueEntry(number, job.deadline_at, job.solo_s, job.key, job.step_s)
        policy.add(entry)
        policy.park(entry)
    chosen = policy.choose(0.0, FakeCosts(4, shared=0.6))
    key = chosen[0].key
    assert len(chosen) == (1 if key is None else min(4, sum(job.key == key for job in jobs)))


def test_fifo_gives_every_shape_its_turn() -> None:
    jobs = [
        FakeJob(0, 6, 1.0, "large"),
        FakeJob(0, 6, 1.0, "small"),
        FakeJob(0, 6, 1.0, "large"),
    ]
    batches, _ = run(Fifo(), jobs, FakeCosts(4, shared=0.6))
    assert batches[:4] == [[0, 2], [1], [0, 2], [1]]


def test_a_short_urgent_request_overtakes_a_running_long_one() -> None:
    jobs = [FakeJob(0, 20, 1.0, "large"), FakeJob(5, 2, 0.5, "small")]
    for policy in (OnTime(), LeastSlack(), ShortestFirst()):
        batches, ended = run(policy, jobs)
        assert batches[5:8] == [[1], [1], [0]], policy
        assert ended[1] == 6.0
