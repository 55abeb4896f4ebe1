import math
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.autoscaling.policy import ScalingParams
from serve_app.engine.scheduling.cost import CostModel, Measurement
from serve_app.engine.scheduling.load import LoadTracker
from serve_app.engine.scheduling.on_time import OnTime
from serve_app.engine.scheduling.policies import Fifo
from serve_app.engine.scheduling.queue import RankedPolicy
from serve_app.planner.cluster import ClusterParams, SimulationOutcome
from serve_app.planner.replica import costs
from serve_app.planner.scalers import ByCount, ByWork, ClusterView, Fixed, Scaler
from serve_app.planner.serve_policy import QueueParams
from serve_app.planner.simulator import Simulator
from serve_app.planner.trace import Kind, Trace, drawn, poisson

SMALL, LARGE = Kind((512, 512), 10), Kind((1024, 1024), 20)
MIX = {SMALL: 3.0, LARGE: 1.0}


def model(max_batch_size: int = 1) -> CostModel:
    """A step of the small ones takes 0.1 s, of the large ones 0.4 s; decoding 0.1 s."""
    cost = CostModel(max_batch_size)
    cost.measured(SMALL.size, Measurement({1: 0.1, 2: 0.15, 4: 0.25}, 0.0, 0.1))
    cost.measured(LARGE.size, Measurement({1: 0.4, 2: 0.79}, 0.0, 0.1))
    return cost


def run(
    at_s: Sequence[float],
    kinds: Sequence[Kind],
    scaler: Scaler,
    replicas: int = 1,
    scheduler: type[RankedPolicy] = OnTime,
    max_batch_size: int = 1,
    **params: object,
) -> SimulationOutcome:
    cluster = ClusterParams(**params)  # type: ignore[arg-type]
    trace = Trace(at_s, kinds)
    return Simulator(trace, model(max_batch_size), scheduler, scaler, cluster, replicas).run()


def test_a_single_request_takes_the_predicted_time() -> None:
    assert costs(model(), [SMALL, LARGE])[LARGE].solo_s == pytest.approx(8.1)
    outcome = run([1.0, 20.0], [SMALL, LARGE], Fixed(1))
    assert outcome.waits_s == pytest.approx([1.1, 8.1])
    assert outcome.on_time == 2
    assert outcome.work_s == pytest.approx(9.2)


def test_a_short_request_starts_at_the_next_step() -> None:
    """It came 0.05 s into a step of 0.4 s; the long one has time to spare."""
    outcome = run([0.0, 4.05], [LARGE, SMALL], Fixed(1))
    short, long = outcome.waits_s
    assert short == pytest.approx(0.35 + 1.1)
    assert long == pytest.approx(8.1 + 1.1)


def test_batches_take_the_time_of_a_batch() -> None:
    outcome = run([0.0] * 4, [SMALL] * 4, Fixed(1), max_batch_size=4, scheduler=Fifo)
    # The first starts alone; after its first step all four share.
    assert max(outcome.waits_s) == pytest.approx(0.1 + 9 * 0.25 + 0.1 + 3 * 0.1, abs=0.3)
    alone = run([0.0] * 4, [SMALL] * 4, Fixed(1), scheduler=Fifo)
    assert max(alone.waits_s) == pytest.approx(4.4)


scalers = st.sampled_from(
    [
        lambda: Fixed(2),
        lambda: ByCount(QueueParams(0, 4, 1.0, 0.0, 5.0)),
        lambda: ByWork(ScalingParams(0, 4, cold_start_s=5.0, hold_s=5.0)),
        lambda: ByWork(ScalingParams(1, 3, target_drain_s=5.0)),
    ]
)


@given(
    st.lists(st.tuples(st.floats(0, 200), st.sampled_from([SMALL, LARGE])), max_size=40),
    scalers,
    st.sampled_from([0.0, 30.0]),
    st.sampled_from([0.0, 200.0]),
    st.sampled_from([math.inf, 5.0]),
    st.sampled_from(["count", "work"]),
    st.integers(1, 4),
)
def test_every_request_ends_once(
    arrivals: list[tuple[float, Kind]],
    scaler: "type[Scaler]",
    node_idle_s: float,
    failures_per_hour: float,
    max_backlog_s: float,
    routing: str,
    choices: int,
) -> None:
    arrivals = sorted(arrivals, key=lambda entry: entry[0])
    at_s, kinds = [at for at, _ in arrivals], [kind for _, kind in arrivals]
    outcome = run(
        at_s,
        kinds,
        scaler(),
        replicas=2,
        node_start_s=3.0,
        replica_start_s=2.0,
        node_idle_s=node_idle_s,
        failures_per_hour=failures_per_hour,
        max_backlog_s=max_backlog_s,
        routing=routing,
        choices=choices,
        max_running=3,
    )
    assert len(outcome.waits_s) + outcome.rejected == len(arrivals)
    assert outcome.on_time <= len(outcome.waits_s)
    solo_s = [costs(model(), [kind])[kind].solo_s for kind in kinds]
    assert outcome.work_s == pytest.approx(sum(solo_s))
    if outcome.waits_s:
        assert min(outcome.waits_s) >= min(solo_s) - 1e-6
    if not failures_per_hour and not outcome.rejected:
        assert outcome.gpu_s >= outcome.work_s - 1e-6


def test_the_work_of_a_lost_replica_is_repeated() -> None:
    at_s = poisson(0.5, 600, seed=1)
    outcome = run(
        at_s,
        [SMALL] * len(at_s),
        Fixed(3),
        replicas=3,
        failures_per_hour=60.0,
        node_start_s=5.0,
        replica_start_s=5.0,
    )
    assert outcome.lost_replicas > 10
    assert len(outcome.waits_s) == len(at_s)


def test_to_zero_and_back() -> None:
    """Whoever comes while there is none waits for the start, and is not refused."""
    outcome = run(
        [0.0, 1_000.0],
        [SMALL, SMALL],
        ByWork(ScalingParams(0, 4, hold_s=10.0)),
        node_start_s=20.0,
        replica_start_s=10.0,
        node_idle_s=0.0,
    )
    assert outcome.rejected == 0
    running = [sample.running for sample in outcome.samples]
    assert running[0] == 1
    assert 0 in running
    assert outcome.waits_s[1] == pytest.approx(31.1, abs=1.1)
    assert outcome.gpu_s < 250


class Scripted:
    """Wants so many from then on; keeps what it was shown."""

    def __init__(self, *wanted: tuple[float, int]) -> None:
        self._wanted = wanted
        self.seen: list[ClusterView] = []

    def decide(self, cluster: ClusterView) -> tuple[int, str]:
        self.seen.append(cluster)
        return [number for at_s, number in self._wanted if at_s <= cluster.at_s][-1], "scripted"


def test_replicas_report_the_gain_of_batches_as_the_engine_measures_it() -> None:
    """A full batch of four is 1.6 times as fast as one after the other."""
    at_s = [0.5 * number for number in range(240)]
    together, alone = Scripted((0.0, 1)), Scripted((0.0, 1))
    run(at_s, [SMALL] * 240, together, max_batch_size=4, scheduler=Fifo)
    run(at_s, [SMALL] * 240, alone, scheduler=Fifo)
    assert {view.replicas[0].throughput for view in alone.seen} == {1.0}
    # The engine's own bookkeeping, of four that go on together for two minutes.
    demand, now = LoadTracker(), 0.0
    demand.accepted(now, 1_000.0, False)
    while now < 120:
        for _ in range(10):
            now += 0.25
            demand.called(0.4, 0.25)
            demand.update_remaining(now, 1_000.0, 1_000.0, False)
        now += 0.4  # decoding, one after the other
        demand.update_remaining(now, 1_000.0, 1_000.0, False)
    measured = [view.replicas[0].throughput for view in together.seen if 60 < view.at_s < 120]
    assert demand.throughput() == pytest.approx(1.5, abs=0.02)
    assert sum(measured) / len(measured) == pytest.approx(demand.throughput(), abs=0.05)


def test_waiting_work_is_divided_by_the_gain_of_batches() -> None:
    at_s = [0.5 * number for number in range(240)]
    scaler = Scripted((0.0, 1))
    outcome = run(at_s, [SMALL] * 240, scaler, max_batch_size=4, scheduler=Fifo)
    ends_at = sorted(at + wait for at, wait in zip(at_s, outcome.waits_s, strict=True))[-1]
    [seen] = [view for view in scaler.seen if view.at_s == 120.0]
    assert seen.requests > 20
    assert seen.at_s + seen.replicas[0].backlog_s == pytest.approx(ends_at, rel=0.05)


def test_more_requests_are_admitted_where_batches_gain() -> None:
    """As many seconds of waiting are more work."""
    at_s = [0.25 * number for number in range(1_000)]
    here = []
    for batch in (1, 4):
        scaler = Scripted((0.0, 1))
        run(at_s, [SMALL] * 1_000, scaler, max_batch_size=batch, scheduler=Fifo, max_backlog_s=10.0)
        seen = [view for view in scaler.seen if 60 < view.at_s < 240]
        assert max(view.replicas[0].backlog_s for view in seen) < 10.0 + 1.1
        assert min(view.replicas[0].backlog_s for view in seen) > 8.0
        here.append(sum(view.requests for view in seen) / len(seen))
    assert here[1] == pytest.approx(1.5 * here[0], rel=0.1)


def test_batches_that_gain_need_fewer_replicas() -> None:
    trace = drawn(poisson(6.0, 900, seed=1), {SMALL: 1.0}, None, seed=1)
    alone, together = (
        Simulator(trace, model(batch), Fifo, ByWork(ScalingParams(1, 20)), ClusterParams(), 1).run()
        for batch in (1, 4)
    )
    assert together.gpu_s < 0.85 * alone.gpu_s
    assert together.attainment > alone.attainment - 0.05


def test_the_idle_time_of_a_node_begins_after_its_boot() -> None:
    """Its replica is given up after 10 of 60 s; wanted again, it has to wait for the rest."""
    machines = {"node_start_s": 60.0, "replica_start_s": 30.0, "node_idle_s": 40.0}
    again = run(
        [0.0, 400.0],
        [SMALL] * 2,
        Scripted((0.0, 1), (10.0, 2), (20.0, 1), (40.0, 2), (150.0, 1)),
        **machines,
    )
    running = {sample.at_s: sample.running for sample in again.samples}
    assert running[99.0] == 1
    assert running[101.0] == 2
    nodes = {sample.at_s: sample.nodes for sample in again.samples}
    assert [nodes[at_s] for at_s in (15.0, 30.0, 60.0, 120.0, 189.0)] == [2] * 5
    assert nodes[191.0] == 1
    # Not wanted again: it comes at 70 s, and is kept for 40.
    never = run([0.0, 400.0], [SMALL] * 2, Scripted((0.0, 1), (10.0, 2), (20.0, 1)), **machines)
    nodes = {sample.at_s: sample.nodes for sample in never.samples}
    assert (nodes[109.0], nodes[111.0]) == (2, 1)


def test_nodes_are_paid_until_they_have_idled() -> None:
    lasting = run([0.0, 500.0], [SMALL] * 2, Fixed(2), replicas=2)
    assert lasting.gpu_s == pytest.approx(2 * 501.1)
    small = ScalingParams(1, 2, hold_s=0.0, cold_start_s=1.0)
    at_s = [0.0, *poisson(0.1, 500, seed=1), 500.0]
    for idle_s in (0.0, 50.0):
        outcome = run(at_s, [SMALL] * len(at_s), ByWork(small), 2, node_idle_s=idle_s)
        gave_up = next(sample.at_s for sample in outcome.samples if sample.running == 1)
        one_s = outcome.samples[-1].at_s
        assert outcome.gpu_s == pytest.approx(one_s + gave_up + idle_s, abs=5)


def test_a_step_up_is_answered_by_work_and_attained() -> None:
    rng = Random(3)
    at_s = sorted(rng.uniform(0, 1_200) for _ in range(300))
    at_s += sorted(rng.uniform(1_200, 2_400) for _ in range(1_500))
    trace = drawn(at_s, MIX, None, seed=1)
    few, many, ours = (
        Simulator(trace, model(), OnTime, scaler, ClusterParams(), replicas).run()
        for scaler, replicas in (
            (Fixed(2), 2),
            (Fixed(8), 8),
            (ByWork(ScalingParams(1, 20)), 1),
        )
    )
    assert ours.attainment > few.attainment + 0.2
    assert ours.gpu_s < many.gpu_s
    before = [sample.target for sample in ours.samples if sample.at_s < 1_200]
    after = [sample.target for sample in ours.samples if 1_800 < sample.at_s < 2_400]
    assert max(before) <= 3
    assert min(after) >= 3
    assert sum(after) / len(after) >= 4


def test_the_same_seed_gives_the_same_outcome() -> None:
    at_s = poisson(1.0, 200, seed=1)
    trace = drawn(at_s, MIX, None, seed=1)
    first, second = (
        Simulator(trace, model(), OnTime, ByWork(ScalingParams(1, 9)), ClusterParams(), 1).run()
        for _ in range(2)
    )
    assert first == second
