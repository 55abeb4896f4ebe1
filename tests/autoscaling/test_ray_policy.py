"""The adapter between Serve's autoscaler and the policy, on Serve's own contexts."""

import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from serve_app.autoscaling.policy import ReplicaLoad
from serve_app.autoscaling.ray_policy import WorkPolicy, load_of
from serve_app.config import WORK_POLICY

DEPLOYMENT = DeploymentID("Generator", "diffusion-serve")
NOW = 1_000_000.0
FIGURES = {
    "backlog_s": 3.0,
    "batch_backlog_s": 0.5,
    "arrival_rate": 0.4,
    "throughput": 1.2,
    "mean_work_s": 2.0,
    "utilization": 0.3,
    "cold_start_s": 20.0,
}


pytestmark = pytest.mark.usefixtures("log_stays_ours")


@pytest.fixture
def serve_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What is said through Serve's logger, which hands nothing on."""
    log = logging.getLogger("ray.serve")
    log.addHandler(caplog.handler)
    yield caplog
    log.removeHandler(caplog.handler)


def replica(name: str) -> ReplicaID:
    return ReplicaID(name, DEPLOYMENT)


def context(
    said: dict[str, dict[str, Any]] | None = None,
    *,
    age_s: float = 0.5,
    target: int | None = None,
    at_s: float = NOW,
    queued: float = 0.0,
    bounds: tuple[int, int] = (0, 10),
    running: list[str] | None = None,
    last_scale_up_time: float | None = None,
    metrics_interval_s: float = 10.0,
) -> AutoscalingContext:
    """Of the replicas that said something, unless others run; all of it ``age_s`` ago."""
    said = said or {}
    running = list(said) if running is None else running
    raw: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = {}
    for name, figures in said.items():
        for figure, value in figures.items():
            before = TimeStampedValue(at_s - age_s - 1, 1e9)
            latest = TimeStampedValue(at_s - age_s, value)
            raw.setdefault(figure, {})[replica(name)] = [before, latest]
    # A context knows nothing of the interval but through the config, where it is deprecated.
    config = AutoscalingConfig(max_replicas=10)
    object.__setattr__(config, "metrics_interval_s", metrics_interval_s)
    return AutoscalingContext(
        deployment_id=DEPLOYMENT,
        deployment_name=DEPLOYMENT.name,
        app_name=DEPLOYMENT.app_name,
        current_num_replicas=len(running),
        target_num_replicas=len(running) if target is None else target,
        running_replicas=[replica(name) for name in running],
        total_num_requests=0.0,
        total_queued_requests=lambda: queued,
        aggregated_metrics=lambda: pytest.fail("an average over the past is no use"),
        raw_metrics=lambda: raw,
        capacity_adjusted_min_replicas=bounds[0],
        capacity_adjusted_max_replicas=bounds[1],
        policy_state={},
        last_scale_up_time=last_scale_up_time,
        last_scale_down_time=None,
        current_time=at_s,
        config=config,
    )


def test_the_latest_figures_of_each_replica_count() -> None:
    load = load_of(context({"a": FIGURES, "b": FIGURES | {"backlog_s": 7.0}}, queued=2.0, target=3))
    assert (load.at_s, load.running, load.target, load.queued_requests) == (NOW, 2, 3, 2.0)
    first = ReplicaLoad(
        backlog_s=3.0, arrival_rate=0.4, throughput=1.2, mean_work_s=2.0, batch_backlog_s=0.5
    )
    assert load.replicas[0] == first
    assert load.replicas[1].backlog_s == 7.0


@pytest.mark.parametrize(
    "said",
    [
        {},
        {name: value for name, value in FIGURES.items() if name != "throughput"},
        FIGURES | {"backlog_s": math.nan},
        FIGURES | {"throughput": 0.0},
    ],
)
def test_a_replica_that_has_not_said_all_is_not_known(said: dict[str, float]) -> None:
    load = load_of(context({"a": FIGURES, "b": said}))
    assert load.running == 2
    assert len(load.replicas) == 1


def test_what_was_said_long_ago_is_not_known() -> None:
    assert len(load_of(context({"a": FIGURES}, age_s=9)).replicas) == 1
    assert not load_of(context({"a": FIGURES}, age_s=31)).replicas
    assert not load_of(context({"a": FIGURES}, age_s=11, metrics_interval_s=1)).replicas
    # A clock that is ahead is no reason to doubt.
    assert load_of(context({"a": FIGURES}, age_s=-5)).replicas


def test_a_replica_that_runs_no_more_is_not_counted() -> None:
    load = load_of(context({"a": FIGURES, "gone": FIGURES}, running=["a"]))
    assert len(load.replicas) == 1


def test_the_bounds_are_those_that_serve_has() -> None:
    busy = {"a": FIGURES | {"backlog_s": 10_000.0}}
    assert WorkPolicy()(context(busy, bounds=(1, 4))) == (4, {})
    assert WorkPolicy()(context(busy, bounds=(1, 7))) == (7, {})
    assert WorkPolicy()(context({}, bounds=(2, 7)))[0] == 2


def test_the_knobs_are_heeded() -> None:
    said = {"a": FIGURES | {"backlog_s": 600.0, "arrival_rate": 0.0}}
    patient = WorkPolicy(target_drain_s=600)(context(said))[0]
    assert WorkPolicy(target_drain_s=30, cold_start_s=1)(context(said))[0] > patient


def test_a_change_of_the_number_is_one_line(serve_log: pytest.LogCaptureFixture) -> None:
    serve_log.set_level(logging.INFO, "ray.serve")
    policy = WorkPolicy(hold_s=0, cold_start_s=1, target_drain_s=120)
    for tick in range(50):
        policy(context({"a": FIGURES}, at_s=NOW + tick / 10))
    for tick in range(50, 100):
        busy = {"a": FIGURES | {"backlog_s": 150.0}}
        policy(context(busy, at_s=NOW + tick / 10, target=3 if tick > 50 else 1))
    lines = [record.getMessage() for record in serve_log.records]
    assert len(lines) == 2, lines
    assert lines[0].startswith("diffusion-serve/Generator: 1 replicas, by arrivals: running 1, ")
    assert "by backlog" in lines[1]
    assert "waiting_s 150" in lines[1]


def test_figures_that_stay_missing_are_told_once(serve_log: pytest.LogCaptureFixture) -> None:
    policy = WorkPolicy()

    def told(of: int) -> int:
        return serve_log.text.count(f"no figures, or old ones, of 1 of {of} replicas for 60 s")

    both = dict.fromkeys("ab", FIGURES)
    for second in range(60):  # a start, for one
        policy(context({"a": FIGURES}, running=["a", "b"], at_s=NOW + second))
    assert not told(2)
    policy(context(both, at_s=NOW + 60))
    for second in range(61, 300):
        policy(context({"a": FIGURES}, running=["a", "b"], at_s=NOW + second))
    assert told(2) == 1
    policy(context(both, at_s=NOW + 300))
    for second in range(301, 400):
        policy(context(both, running=["a", "b", "c"], at_s=NOW + second))
    assert told(3) == 1


def test_a_first_replica_that_serve_started_is_kept_though_nobody_waits() -> None:
    policy = WorkPolicy(cold_start_s=100, hold_s=0)
    assert policy(context(at_s=NOW))[0] == 0
    up = {"last_scale_up_time": NOW + 1, "target": 1}
    assert policy(context(at_s=NOW + 30, **up))[0] == 1  # type: ignore[arg-type]
    assert policy(context(at_s=NOW + 300, **up))[0] == 1  # type: ignore[arg-type]
    assert policy(context(at_s=NOW + 600, **up))[0] == 0  # type: ignore[arg-type]


def test_the_start_of_the_first_replica_is_measured_though_serve_decided_it() -> None:
    policy = WorkPolicy(cold_start_s=100)
    policy(context(at_s=NOW))
    # Nobody asks while none runs and a request waits: Serve starts one by itself.
    up = {"last_scale_up_time": NOW + 1, "target": 1}
    policy(context({"a": FIGURES}, at_s=NOW + 31, **up))  # type: ignore[arg-type]
    assert policy._memory.cold_start_s == pytest.approx(30)
    assert not policy._memory.starts


def test_an_old_start_is_not_taken_for_a_long_one() -> None:
    policy = WorkPolicy()
    policy(context({"a": FIGURES}, last_scale_up_time=NOW - 5_000))
    assert policy._memory.cold_start_s is None


def test_what_there_is_when_it_is_made_was_wanted() -> None:
    idle = dict.fromkeys("abc", FIGURES | {"backlog_s": 0.0, "arrival_rate": 0.0})
    policy = WorkPolicy(hold_s=20, cold_start_s=1)
    assert policy(context(idle))[0] == 3
    assert policy(context(idle, at_s=NOW + 19))[0] == 3
    assert policy(context(idle, at_s=NOW + 21))[0] < 3


def test_a_start_that_was_decided_here_is_measured_once() -> None:
    policy = WorkPolicy(cold_start_s=10, target_drain_s=10)
    busy = {"a": FIGURES | {"backlog_s": 40.0}}
    wanted, _ = policy(context(busy, bounds=(0, 3)))
    assert wanted == 3
    up = {"target": 3, "last_scale_up_time": NOW + 0.05, "bounds": (0, 3)}
    policy(context(busy, at_s=NOW + 0.1, **up))  # type: ignore[arg-type]
    assert [start.at_s for start in policy._memory.starts] == [NOW]
    said = dict.fromkeys("abc", FIGURES)
    policy(context(said, at_s=NOW + 20, **up))  # type: ignore[arg-type]
    assert policy._memory.cold_start_s == pytest.approx(20)


def test_serve_builds_it_from_what_a_config_file_says() -> None:
    written = AutoscalingPolicy(policy_function=WORK_POLICY, policy_kwargs={"target_drain_s": 5})
    # What the controller gets is pickled by value: it is a class of its own.
    built = AutoscalingPolicy.from_serialized_policy_def(
        written.model_dump(), written.get_serialized_policy_def() or b""
    ).get_policy()
    policy = built(**written.policy_kwargs)
    assert policy(context({"a": FIGURES | {"backlog_s": 100.0}}))[0] > 1


def test_a_wrong_knob_is_said_and_scales_by_the_defaults(
    serve_log: pytest.LogCaptureFixture,
) -> None:
    policy = WorkPolicy(target_drain=5)
    assert "policy_kwargs.target_drain: unknown key; known are" in serve_log.text
    assert policy(context({"a": FIGURES | {"backlog_s": 10_000.0}}))[0] == 10
