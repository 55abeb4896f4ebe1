"""A deadline that a client named is met whenever it can be met."""

from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.scheduling.on_time import OnTime
from serve_app.engine.scheduling.on_time_set import OnTimeSet
from serve_app.engine.scheduling.queue import QueueEntry
from tests.engine.scheduling.simulated_device import FakeCosts, FakeJob, keyed_jobs, numbers


def named(number: int, deadline_at: float, work_s: float, key: str | None = "k") -> QueueEntry:
    entry = QueueEntry(number, deadline_at, work_s, key, min(1.0, work_s), named=True)
    entry.total_work_s = work_s
    return entry


def planned(entries: list[QueueEntry]) -> int:
    """Return the size of the set, if no batch gains anything."""
    on_time_set = OnTimeSet(grace=0.0)
    for entry in entries:
        on_time_set.add(entry)
    on_time_set.plan(0.0)
    return sum(not entry.late for entry in entries)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=9))
def test_the_on_time_set_is_the_largest_possible(work: list[tuple[int, int]]) -> None:
    """Compares with a search through all sets."""
    on_time_set = OnTimeSet(grace=0.0)
    entries = [named(n, deadline, work_s) for n, (work_s, deadline) in enumerate(work)]
    for entry in entries:
        on_time_set.add(entry)
    on_time_set.plan(0.0)

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


@given(keyed_jobs)
def test_as_many_named_deadlines_are_met_as_the_on_time_set_has(jobs: list[FakeJob]) -> None:
    """Half of the requests named no deadline; they wait as long as they must."""
    policy = OnTime(late_share=0.0, grace=0.0)
    entries = [
        QueueEntry(number, job.slo_scale * job.solo_s, job.solo_s, job.key, job.step_s)
        for number, job in enumerate(jobs)
    ]
    for number, entry in enumerate(entries):
        entry.named = number % 2 == 0
        policy.add(entry)
        policy.park(entry)
    feasible = planned([entry for entry in entries if entry.named])
    now, met = 0.0, 0
    while chosen := policy.choose(now, FakeCosts(1)):
        [entry] = chosen
        now += entry.step_s
        entry.remaining_s -= entry.step_s
        if entry.remaining_s > 1e-9:
            policy.park(entry)
            continue
        policy.drop(entry)
        met += entry.named and now <= entry.deadline_at + 1e-6
    assert met >= feasible


def test_batches_make_more_deadlines_feasible() -> None:
    """Three requests of 10 s by 20 s: in turn two are on time, in batches all three."""

    def late(shared: float) -> int:
        policy = OnTime(grace=0.0)
        entries = [named(n, 20.0, 10.0) for n in range(3)]
        for entry in entries:
            policy.add(entry)
            policy.park(entry)
        policy.choose(0.0, FakeCosts(4, shared))
        return sum(entry.late for entry in entries)

    assert late(shared=0.0) == 1
    assert late(shared=0.7) == 0


def test_a_request_within_its_grace_stays_in_the_set() -> None:
    def late(deadline_at: float) -> bool:
        on_time_set = OnTimeSet(grace=0.5)
        entry = named(1, deadline_at, 10.0)
        on_time_set.add(entry)
        on_time_set.plan(0.0)
        return entry.late

    assert not late(deadline_at=6.0)
    assert late(deadline_at=4.0)


def test_a_named_deadline_limits_the_batch() -> None:
    """It may use half of the leader's slack."""

    def size(deadline_at: float) -> int:
        policy = OnTime()
        for entry in (named(0, deadline_at, 10.0), *(QueueEntry(n, 9.0, 10.0, "k", 1.0)
                      for n in range(1, 8))):  # fmt: skip
            policy.add(entry)
            policy.park(entry)
        chosen = policy.choose(0.0, FakeCosts(8, shared=0.8))
        assert 0 in numbers(chosen)
        return len(chosen)

    assert size(deadline_at=12.0) == 1
    assert size(deadline_at=14.0) == 2
    assert size(deadline_at=20.0) == 8  # the slack is large enough for a full batch


def test_requests_without_a_deadline_keep_a_share_beside_named_deadlines() -> None:
    """An endless stream of named deadlines that need the whole device, and one other request."""
    policy = OnTime(late_share=0.1, patience=1.0)
    other = QueueEntry(0, 30.0, 10.0, "large", 1.0)
    policy.add(other)
    policy.park(other)
    now = 0.0
    for number in range(1, 400):
        request = named(number, now + 1.05, 1.0, "small")
        request.arrived_at = now
        policy.add(request)
        policy.park(request)
        while request.group is not None and now < request.deadline_at:
            [chosen] = policy.choose(now, FakeCosts(1))
            now += 1.0
            if chosen is other:
                other.remaining_s -= 1.0
                if not other.remaining_s:
                    assert number > 50
                    return
                policy.park(other)
        policy.drop(request)
    raise AssertionError("it starved")


def test_a_named_deadline_goes_before_the_call_that_would_break_it() -> None:
    """A late group could run a full batch of 2.5 s."""

    def leader(deadline_at: float) -> int:
        policy = OnTime()
        for n in range(4):
            entry = QueueEntry(n, -5.0, 10.0, "late", 1.0)
            policy.add(entry)
            policy.park(entry)
        request = named(9, deadline_at, 2.0, "named")
        policy.add(request)
        policy.park(request)
        return numbers(policy.choose(0.0, FakeCosts(4, shared=0.5)))[0]

    assert leader(deadline_at=6.0) == 9  # 4 s of slack, of which half is a reserve
    assert leader(deadline_at=8.0) == 0
