import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.autoscaling.policy import Load, PolicyState, ScalingParams, Start, decide
from serve_app.protocol.load import ReplicaLoad
from tests.autoscaling.cluster import Cluster, changes_of, targets_under_poisson

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
        reports=known,
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
def histories(draw: st.DrawFn) -> PolicyState:
    """Draw the state after a few decisions."""
    state, params = PolicyState(), draw(all_params())
    for number in range(draw(st.integers(0, 4))):
        _, state = decide(draw(loads(at_s=10.0 * number - 100)), params, state)
    return state


@given(loads(), all_params(), histories())
def test_the_number_is_within_the_bounds(
    load: Load, params: ScalingParams, state: PolicyState
) -> None:
    decision, _ = decide(load, params, state)
    assert params.min_replicas <= decision.replicas <= params.max_replicas


@given(loads(), all_params(), histories(), st.floats(1, 3), st.integers(0, 100))
def test_more_load_never_needs_fewer_replicas(
    load: Load, params: ScalingParams, state: PolicyState, factor: float, queued: int
) -> None:
    more = replace(
        load,
        queued_requests=load.queued_requests + queued,
        reports=[
            replace(one, backlog_s=one.backlog_s * factor, arrival_rate=one.arrival_rate * factor)
            for one in load.reports
        ],
    )
    assert decide(more, params, state)[0].replicas >= decide(load, params, state)[0].replicas


@given(loads(), all_params(), histories())
def test_the_number_is_never_below_the_need_of_the_backlog(
    load: Load, params: ScalingParams, state: PolicyState
) -> None:
    decision, _ = decide(load, params, state)
    backlog_s = sum(one.backlog_s for one in load.reports)
    needed = math.ceil(backlog_s / params.target_drain_s - 1e-6)
    assert decision.replicas >= min(load.target, needed, params.max_replicas)


@given(loads(), all_params(), histories())
def test_replicas_without_reports_are_not_removed(
    load: Load, params: ScalingParams, state: PolicyState
) -> None:
    if len(load.reports) < load.running:
        decision, _ = decide(load, params, state)
        assert decision.replicas >= min(load.target, params.max_replicas)


@pytest.mark.parametrize("busy", [0.4, 1.7, 8.9, 9.0, 30.0])
def test_a_steady_load_changes_nothing_once_it_is_met(busy: float) -> None:
    cluster = Cluster(PARAMS, 1)
    for _ in range(300):
        cluster.step(busy)
    needed = busy / PARAMS.target_utilization
    noise = 2 * math.sqrt(busy * 2.0 / PARAMS.smoothing_s)
    assert math.ceil(needed - 1e-6) <= cluster.target <= math.ceil(needed + noise)
    settled = len(cluster.changes)
    for _ in range(1_000):
        cluster.step(busy)
    assert len(cluster.changes) == settled


@pytest.mark.parametrize(
    ("mean", "an_hour", "apart"), [(0.5, 1, 0), (2.0, 4, 1), (8.0, 8, 2), (25.0, 20, 4)]
)
def test_a_steady_poisson_load_rarely_changes_the_number(
    mean: float, an_hour: float, apart: int
) -> None:
    """The number moves by one at a time; tests/benchmarks/steadiness.py counts how often."""
    targets = targets_under_poisson(mean, hours=4)
    changes = changes_of(targets)
    assert len(changes) / 4 <= an_hour
    assert {abs(change) for change in changes} <= {1}
    assert max(targets) - min(targets) <= apart


def test_one_burst_is_one_scale_up() -> None:
    """A backlog that starting replicas will clear does not start more replicas."""
    cluster = Cluster(PARAMS, 2)
    for _ in range(60):
        cluster.step(1.0)
    assert cluster.target == 2
    backlog_s = 400.0
    while backlog_s > 0:
        cluster.step(1.0, backlog_s)
        backlog_s += 1.0 - cluster.running
    assert [step > 0 for step in cluster.changes].count(True) == 1
    assert "backlog" in cluster.terms


def test_a_surplus_must_last() -> None:
    cluster = Cluster(replace(PARAMS, hold_s=60.0), 1)
    for _ in range(300):
        cluster.step(9.0)
    most = cluster.target
    assert most >= 10
    for _ in range(40):
        cluster.step(4.5)
    assert cluster.target == most
    assert cluster.terms[-1] == "hold"
    for _ in range(300):
        cluster.step(4.5)
    assert 5 <= cluster.target <= 6


@pytest.mark.parametrize(("slow_rate", "held"), [(8.0, True), (8.5, True), (9.0, False)])
def test_noise_keeps_no_replica_when_the_load_clearly_falls(slow_rate: float, held: bool) -> None:
    """The fall exceeds one standard deviation of the average: 0.6, for 2 s requests over 45 s."""
    params = replace(PARAMS, hold_s=0.0)
    state = PolicyState(at_s=0.0, arriving=8.0, arriving_slow=slow_rate, mean_work_s=2.0)
    each = ReplicaLoad(arrival_rate=0.8, mean_work_s=2.0)
    decision, _ = decide(Load(1.0, 10, 10, [each] * 10), params, state)
    assert (decision.term == "hold") == held
    assert (decision.replicas == 10) == held


def test_a_long_cold_start_delays_the_scale_down() -> None:
    quick, slow = Cluster(PARAMS, 10, 20.0), Cluster(PARAMS, 10, 300.0)
    slow.state = PolicyState(cold_start_s=300.0)
    scaled_down_at = []
    for cluster in (quick, slow):
        for _ in range(600):
            cluster.step(4.5)
        scaled_down_at.append(next(n for n, target in enumerate(cluster.targets) if target < 10))
    assert scaled_down_at[0] == 62
    assert scaled_down_at[1] == 102


def test_the_cold_start_is_measured() -> None:
    cluster = Cluster(PARAMS, 1, cold_start_s=70.0)
    for _ in range(200):
        cluster.step(5.0)
    assert cluster.state.cold_start_s == pytest.approx(70, abs=1)


def test_cancelled_starts_are_not_measured() -> None:
    cluster = Cluster(replace(PARAMS, hold_s=0.0), 1, cold_start_s=10_000.0)
    cluster.state = PolicyState(cold_start_s=5.0)
    for _ in range(20):
        cluster.step(5.0)
    assert cluster.target > 1
    for _ in range(600):
        cluster.step(0.1)
    assert cluster.target == 1
    assert cluster.state.cold_start_s == 5.0
    assert cluster.state.starts == ()


def test_a_rise_is_met_ahead() -> None:
    """The policy also buys half of what the rise adds until a new replica is ready."""
    cluster = Cluster(PARAMS, 1, cold_start_s=60.0)
    cluster.state = PolicyState(cold_start_s=60.0)
    for second in range(600):
        cluster.step(second / 30)
    now, added = 600 / 30, 60 / 30
    assert math.ceil((now + 0.9 * added / 2) / 0.9) > math.ceil(now / 0.9)
    assert cluster.target >= math.ceil((now + 0.9 * added / 2) / 0.9)


def test_missing_reports_block_the_scale_down_until_they_return() -> None:
    cluster = Cluster(PARAMS, 1)
    for _ in range(300):
        cluster.step(9.0)
    most = cluster.target
    assert most >= 10
    for _ in range(200):
        cluster.step(9.0, known=0)
        assert cluster.target == most
    for _ in range(200):
        cluster.step(0.9, known=5)
        assert cluster.target == most
    for _ in range(40):
        cluster.step(0.9)
    assert cluster.terms[-1] == "hold"
    for _ in range(200):
        cluster.step(0.9, known=0)
        assert cluster.target == most
    assert cluster.terms[-1] == "blind"
    for _ in range(400):
        cluster.step(0.9)
    assert cluster.target <= 2


def test_to_zero_and_from_zero() -> None:
    params = replace(PARAMS, min_replicas=0)
    cluster = Cluster(params, 1)
    for _ in range(100):
        cluster.step(0.0)
    assert cluster.target == 0
    load = Load(cluster.now + 1, 0, 0, [], queued_requests=30)
    decision, _ = decide(load, params, replace(cluster.state, mean_work_s=4.0))
    assert decision.replicas == math.ceil(30 * 4 / params.target_drain_s)
    assert decision.term == "backlog"


@pytest.mark.parametrize("busy", [0.01, 0.3, 2.7])
def test_an_idle_model_is_at_zero_after_its_hold_time(busy: float) -> None:
    """Its GPU may be what another model waits for; an average would keep it for minutes."""
    cluster = Cluster(replace(PARAMS, min_replicas=0, smoothing_s=75.0, hold_s=30.0), 1)
    for _ in range(600):
        cluster.step(busy)
    assert cluster.target >= 1
    for _ in range(30):
        cluster.step(0.0)
        assert cluster.target >= 1
    for _ in range(2):
        cluster.step(0.0)
    assert cluster.target == 0


def test_a_replica_with_work_is_not_idle_although_nothing_arrives() -> None:
    cluster = Cluster(replace(PARAMS, min_replicas=0, hold_s=0.0), 1)
    for _ in range(300):
        cluster.step(0.0, backlog_s=5.0)
        assert cluster.target == 1


def test_the_start_of_a_first_replica_is_not_cancelled_when_no_request_waits() -> None:
    """A client that retries at its Retry-After finds the replica, kept like a surplus."""
    params = replace(PARAMS, min_replicas=0, hold_s=10.0, cold_start_s=100.0)
    cluster = Cluster(params, 0, cold_start_s=150.0)
    for _ in range(60):
        cluster.step(0.0)
    assert cluster.target == 0
    # Serve starts the first replica, and calls the policy again when no request waits.
    cluster.target, cluster.ready_at = 1, [cluster.now + cluster.cold_start_s]
    start = Start(cluster.now, 1)
    cluster.state = replace(cluster.state, starts=(start,))
    for _ in range(150):
        cluster.step(0.0)
        assert cluster.target == 1
    assert cluster.running == 1
    there_for_s = 0
    while cluster.target:
        cluster.step(0.0)
        there_for_s += 1
    assert cluster.state.cold_start_s is not None
    assert there_for_s == pytest.approx(cluster.state.cold_start_s / 3, abs=2)


def test_a_first_start_that_never_ends_is_cancelled() -> None:
    params = replace(PARAMS, min_replicas=0, hold_s=10.0, cold_start_s=100.0)
    cluster = Cluster(params, 0, cold_start_s=math.inf)
    cluster.step(0.0)
    cluster.target, cluster.ready_at = 1, [math.inf]
    cluster.state = replace(cluster.state, starts=(Start(cluster.now, 1),))
    for _ in range(399):
        cluster.step(0.0)
    assert cluster.target == 1
    for _ in range(300):
        cluster.step(0.0)
    assert cluster.target == 0


def test_low_priority_work_keeps_one_replica_and_starts_none() -> None:
    params = replace(PARAMS, min_replicas=0)
    busy = ReplicaLoad(batch_backlog_s=10_000.0)
    decision, _ = decide(Load(1_000.0, 1, 1, [busy]), params, PolicyState())
    assert (decision.replicas, decision.term) == (1, "batch")


def test_spare_replicas_are_added_while_there_is_work() -> None:
    params = replace(PARAMS, min_replicas=0, spare_replicas=2)
    one = ReplicaLoad(arrival_rate=0.5)
    assert decide(Load(0.0, 1, 1, [one]), params, PolicyState())[0].replicas == 3
    assert decide(Load(0.0, 0, 0, []), params, PolicyState())[0].replicas == 0


def test_a_decision_prints_its_term_and_inputs() -> None:
    decision, _ = decide(Load(0.0, 1, 1, [ReplicaLoad(backlog_s=900.0)]), PARAMS, PolicyState())
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
def test_an_error_names_the_wrong_parameter(change: dict[str, float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        replace(PARAMS, **change)  # type: ignore[arg-type]
