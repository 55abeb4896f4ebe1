import itertools
import math
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.autoscaling.policy import Load, Memory, ReplicaLoad, ScalingParams, Start, decide

PARAMS = ScalingParams(
    min_replicas=1,
    max_replicas=50,
    target_utilization=0.9,
    target_drain_s=30.0,
    smoothing_s=45.0,
    hold_s=60.0,
    cold_start_s=20.0,
)

rates = st.floats(0, 20)
backlogs = st.floats(0, 500)


@st.composite
def replica_loads(draw: st.DrawFn) -> ReplicaLoad:
    return ReplicaLoad(
        backlog_s=draw(backlogs),
        arrival_rate=draw(rates),
        throughput=draw(st.floats(0.5, 4)),
        mean_work_s=draw(st.floats(0, 10)),
        batch_backlog_s=draw(st.sampled_from([0.0, 50.0])),
    )


@st.composite
def loads(draw: st.DrawFn, at_s: float = 0.0) -> Load:
    known = draw(st.lists(replica_loads(), max_size=6))
    running = len(known) + draw(st.integers(0, 2))
    return Load(
        at_s=at_s,
        running=running,
        target=running + draw(st.integers(0, 3)),
        replicas=known,
        queued_requests=draw(st.integers(0, 50)),
    )


@st.composite
def all_params(draw: st.DrawFn) -> ScalingParams:
    fewest = draw(st.integers(0, 3))
    return ScalingParams(
        min_replicas=fewest,
        max_replicas=fewest + draw(st.integers(0, 30)),
        target_utilization=draw(st.floats(0.3, 1)),
        spare_replicas=draw(st.integers(0, 2)),
        target_drain_s=draw(st.floats(1, 300)),
        cold_start_s=draw(st.floats(1, 300)),
    )


@st.composite
def histories(draw: st.DrawFn) -> Memory:
    """What a few decisions leave behind."""
    memory, params = Memory(), draw(all_params())
    for number in range(draw(st.integers(0, 4))):
        _, memory = decide(draw(loads(at_s=10.0 * number - 100)), params, memory)
    return memory


@given(loads(), all_params(), histories())
def test_within_bounds(load: Load, params: ScalingParams, memory: Memory) -> None:
    decision, _ = decide(load, params, memory)
    assert params.min_replicas <= decision.replicas <= params.max_replicas


@given(loads(), all_params(), histories(), st.floats(1, 3), st.integers(0, 100))
def test_more_load_never_wants_fewer(
    load: Load, params: ScalingParams, memory: Memory, factor: float, queued: int
) -> None:
    more = replace(
        load,
        queued_requests=load.queued_requests + queued,
        replicas=[
            replace(one, backlog_s=one.backlog_s * factor, arrival_rate=one.arrival_rate * factor)
            for one in load.replicas
        ],
    )
    assert decide(more, params, memory)[0].replicas >= decide(load, params, memory)[0].replicas


@given(loads(), all_params(), histories())
def test_never_below_what_the_backlog_needs(
    load: Load, params: ScalingParams, memory: Memory
) -> None:
    decision, _ = decide(load, params, memory)
    backlog_s = sum(one.backlog_s for one in load.replicas)
    needed = math.ceil(backlog_s / params.target_drain_s - 1e-6)
    assert decision.replicas >= min(load.target, needed, params.max_replicas)


@given(loads(), all_params(), histories())
def test_what_is_not_known_is_not_given_up(
    load: Load, params: ScalingParams, memory: Memory
) -> None:
    if len(load.replicas) < load.running:
        decision, _ = decide(load, params, memory)
        assert decision.replicas >= min(load.target, params.max_replicas)


class Cluster:
    """Replicas that follow the policy, each decision a second after the last."""

    def __init__(self, params: ScalingParams, running: int, cold_start_s: float = 20.0) -> None:
        self.params = params
        self.cold_start_s = cold_start_s
        self.memory = Memory()
        self.now = 0.0
        self.running = self.target = running
        self.ready_at: list[float] = []
        self.targets = [running]
        self.terms: list[str] = []

    def tick(self, busy: float, backlog_s: float = 0.0, known: int | None = None) -> None:
        """``busy``: replicas that arriving work keeps busy; ``known``: how many tell of it."""
        self.now += 1
        self.running += sum(at <= self.now for at in self.ready_at)
        self.ready_at = [at for at in self.ready_at if at > self.now]
        number = self.running if known is None else min(known, self.running)
        each = ReplicaLoad(
            backlog_s / max(1, self.running), busy / max(1, self.running), mean_work_s=2.0
        )
        load = Load(self.now, self.running, self.target, [each] * number)
        decision, self.memory = decide(load, self.params, self.memory)
        new = decision.replicas - self.target
        self.ready_at += [self.now + self.cold_start_s] * max(0, new)
        for _ in range(max(0, -new)):
            if self.ready_at:
                self.ready_at.pop()
            else:
                self.running -= 1
        self.target = decision.replicas
        self.targets.append(self.target)
        self.terms.append(decision.term)

    @property
    def changes(self) -> list[int]:
        steps = [after - before for before, after in itertools.pairwise(self.targets)]
        return [step for step in steps if step]


@pytest.mark.parametrize("busy", [0.4, 1.7, 8.9, 9.0, 30.0])
def test_a_steady_load_changes_nothing_once_it_is_answered(busy: float) -> None:
    cluster = Cluster(PARAMS, 1)
    for _ in range(300):
        cluster.tick(busy)
    needed = busy / PARAMS.target_utilization
    noise = 2 * math.sqrt(busy * 2.0 / PARAMS.smoothing_s)
    assert math.ceil(needed - 1e-6) <= cluster.target <= math.ceil(needed + noise)
    settled = len(cluster.changes)
    for _ in range(1_000):
        cluster.tick(busy)
    assert len(cluster.changes) == settled


@pytest.mark.parametrize(
    ("mean", "an_hour", "apart"), [(0.5, 1, 0), (2.0, 4, 1), (8.0, 8, 2), (25.0, 20, 4)]
)
def test_a_steady_load_that_is_drawn_hardly_ever_moves_the_number(
    mean: float, an_hour: float, apart: int
) -> None:
    """Poisson arrivals of 2 s each, counted over 30 s as replicas do, for four hours; the defaults.

    It moves 0, 2.5, 6 and 19.5 times an hour, each time by one; without a margin for noise it would
    be 0, 28, 40 and 78.
    """
    rng = Random(1)
    cluster = Cluster(ScalingParams(1, 50), 1, cold_start_s=90.0)
    window, backlog_s = [0.0] * 30, 0.0
    arrives_at = rng.expovariate(mean / 2)
    for second in range(900 + 4 * 3_600):
        if second == 900:
            settled = len(cluster.changes)
        work_s = 0.0
        while arrives_at < second + 1:
            work_s += 2.0
            arrives_at += rng.expovariate(mean / 2)
        window[second % 30] = work_s
        backlog_s = max(0.0, backlog_s + work_s - cluster.running)
        cluster.tick(sum(window) / 30, backlog_s)
    changes = cluster.changes[settled:]
    assert len(changes) / 4 <= an_hour
    assert {abs(change) for change in changes} <= {1}
    assert max(cluster.targets[900:]) - min(cluster.targets[900:]) <= apart


def test_one_burst_is_one_scale_up() -> None:
    """A backlog that new replicas will see to is not answered again while they start."""
    cluster = Cluster(PARAMS, 2)
    for _ in range(60):
        cluster.tick(1.0)
    assert cluster.target == 2
    backlog_s = 400.0
    while backlog_s > 0:
        cluster.tick(1.0, backlog_s)
        backlog_s += 1.0 - cluster.running
    assert [step > 0 for step in cluster.changes].count(True) == 1
    assert "backlog" in cluster.terms


def test_a_surplus_must_last() -> None:
    cluster = Cluster(replace(PARAMS, hold_s=60.0), 1)
    for _ in range(300):
        cluster.tick(9.0)
    most = cluster.target
    assert most >= 10
    for _ in range(40):
        cluster.tick(4.5)
    assert cluster.target == most
    assert cluster.terms[-1] == "held"
    for _ in range(300):
        cluster.tick(4.5)
    assert 5 <= cluster.target <= 6


@pytest.mark.parametrize(("slow_rate", "held"), [(8.0, True), (8.5, True), (9.0, False)])
def test_noise_holds_nothing_once_the_load_plainly_falls(slow_rate: float, held: bool) -> None:
    """By more than a standard deviation of its average: 0.6 here, of 2 s requests over 45 s."""
    params = replace(PARAMS, hold_s=0.0)
    memory = Memory(at_s=0.0, arrival_rate=8.0, slow_rate=slow_rate, mean_work_s=2.0)
    each = ReplicaLoad(arrival_rate=0.8, mean_work_s=2.0)
    decision, _ = decide(Load(1.0, 10, 10, [each] * 10), params, memory)
    assert (decision.term == "held") == held
    assert (decision.replicas == 10) == held


def test_a_long_cold_start_makes_it_more_patient() -> None:
    quick, slow = Cluster(PARAMS, 10, 20.0), Cluster(PARAMS, 10, 300.0)
    slow.memory = Memory(cold_start_s=300.0)
    gave_up = []
    for cluster in (quick, slow):
        for _ in range(600):
            cluster.tick(4.5)
        gave_up.append(next(n for n, target in enumerate(cluster.targets) if target < 10))
    assert gave_up[0] == 62
    assert gave_up[1] == 102


def test_the_cold_start_is_measured() -> None:
    cluster = Cluster(PARAMS, 1, cold_start_s=70.0)
    for _ in range(200):
        cluster.tick(5.0)
    assert cluster.memory.cold_start_s == pytest.approx(70, abs=1)


def test_starts_that_are_given_up_do_not_count_as_measured() -> None:
    cluster = Cluster(replace(PARAMS, hold_s=0.0), 1, cold_start_s=10_000.0)
    cluster.memory = Memory(cold_start_s=5.0)
    for _ in range(20):
        cluster.tick(5.0)
    assert cluster.target > 1
    for _ in range(600):
        cluster.tick(0.1)
    assert cluster.target == 1
    assert cluster.memory.cold_start_s == 5.0
    assert cluster.memory.starts == ()


def test_a_rise_is_answered_ahead() -> None:
    """Half of what the rise adds until a new replica is there is bought, not just what comes."""
    cluster = Cluster(PARAMS, 1, cold_start_s=60.0)
    cluster.memory = Memory(cold_start_s=60.0)
    for second in range(600):
        cluster.tick(second / 30)
    now, added = 600 / 30, 60 / 30
    assert math.ceil((now + 0.9 * added / 2) / 0.9) > math.ceil(now / 0.9)
    assert cluster.target >= math.ceil((now + 0.9 * added / 2) / 0.9)


def test_missing_figures_hold_what_is_there_and_then_let_go() -> None:
    cluster = Cluster(PARAMS, 1)
    for _ in range(300):
        cluster.tick(9.0)
    most = cluster.target
    assert most >= 10
    for _ in range(200):
        cluster.tick(9.0, known=0)
        assert cluster.target == most
    for _ in range(200):
        cluster.tick(0.9, known=5)
        assert cluster.target == most
    for _ in range(40):
        cluster.tick(0.9)
    assert cluster.terms[-1] == "held"
    for _ in range(200):
        cluster.tick(0.9, known=0)
        assert cluster.target == most
    assert cluster.terms[-1] == "blind"
    for _ in range(400):
        cluster.tick(0.9)
    assert cluster.target <= 2


def test_to_zero_and_from_zero() -> None:
    params = replace(PARAMS, min_replicas=0)
    cluster = Cluster(params, 1)
    for _ in range(100):
        cluster.tick(0.0)
    assert cluster.target == 0
    load = Load(cluster.now + 1, 0, 0, [], queued_requests=30)
    decision, _ = decide(load, params, replace(cluster.memory, mean_work_s=4.0))
    assert decision.replicas == math.ceil(30 * 4 / params.target_drain_s)
    assert decision.term == "backlog"


def test_the_first_replica_is_awaited_though_nobody_waits_any_more() -> None:
    """Who was told to come when it is there shall find it, and for as long as a surplus is held."""
    params = replace(PARAMS, min_replicas=0, hold_s=10.0, cold_start_s=100.0)
    cluster = Cluster(params, 0, cold_start_s=150.0)
    for _ in range(60):
        cluster.tick(0.0)
    assert cluster.target == 0
    # Serve starts the first one by itself, and asks again when who waited for it has gone.
    cluster.target, cluster.ready_at = 1, [cluster.now + cluster.cold_start_s]
    start = Start(cluster.now, 1)
    cluster.memory = replace(cluster.memory, starts=(start,))
    for _ in range(150):
        cluster.tick(0.0)
        assert cluster.target == 1
    assert cluster.running == 1
    there_for_s = 0
    while cluster.target:
        cluster.tick(0.0)
        there_for_s += 1
    assert cluster.memory.cold_start_s is not None
    assert there_for_s == pytest.approx(cluster.memory.cold_start_s / 3, abs=2)


def test_a_first_replica_that_never_comes_is_given_up() -> None:
    params = replace(PARAMS, min_replicas=0, hold_s=10.0, cold_start_s=100.0)
    cluster = Cluster(params, 0, cold_start_s=math.inf)
    cluster.tick(0.0)
    cluster.target, cluster.ready_at = 1, [math.inf]
    cluster.memory = replace(cluster.memory, starts=(Start(cluster.now, 1),))
    for _ in range(399):
        cluster.tick(0.0)
    assert cluster.target == 1
    for _ in range(300):
        cluster.tick(0.0)
    assert cluster.target == 0


def test_batch_work_keeps_one_replica_and_buys_none() -> None:
    params = replace(PARAMS, min_replicas=0)
    busy = ReplicaLoad(batch_backlog_s=10_000.0)
    decision, _ = decide(Load(1_000.0, 1, 1, [busy]), params, Memory())
    assert (decision.replicas, decision.term) == (1, "batch")


def test_spare_replicas_are_on_top_while_there_is_work() -> None:
    params = replace(PARAMS, min_replicas=0, spare_replicas=2)
    one = ReplicaLoad(arrival_rate=0.5)
    assert decide(Load(0.0, 1, 1, [one]), params, Memory())[0].replicas == 3
    assert decide(Load(0.0, 0, 0, []), params, Memory())[0].replicas == 0


def test_a_decision_says_what_ruled_and_from_what() -> None:
    decision, _ = decide(Load(0.0, 1, 1, [ReplicaLoad(backlog_s=900.0)]), PARAMS, Memory())
    assert str(decision).startswith(f"{decision.replicas} replicas, by backlog: running 1, ")
    assert "waiting_s 900" in str(decision)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"target_utilization": 0.0}, "target_utilization must be over 0"),
        ({"target_utilization": 1.5}, "at most 1"),
        ({"target_drain_s": 0.0}, "target_drain_s must be over 0"),
        ({"cold_start_s": math.inf}, "cold_start_s"),
        ({"hold_s": -1.0}, "hold_s must not be negative"),
        ({"spare_replicas": -1}, "spare_replicas"),
        ({"min_replicas": 5, "max_replicas": 4}, "min_replicas is 5 and max_replicas 4"),
    ],
)
def test_wrong_params_are_named(change: dict[str, float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        replace(PARAMS, **change)  # type: ignore[arg-type]
