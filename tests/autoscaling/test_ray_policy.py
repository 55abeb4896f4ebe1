"""The adapter between Serve's autoscaler and the policy, on Serve's own contexts."""

import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from serve_app.autoscaling.ray_policy import WorkPolicy, load_of
from serve_app.config.serve_file import WORK_POLICY
from serve_app.protocol.load import ReplicaLoad

DEPLOYMENT = DeploymentID("Generator", "diffusion-serve")
NOW = 1_000_000.0
LOAD = {
    "backlog_s": 3.0,
    "batch_backlog_s": 0.5,
    "arrival_rate": 0.4,
    "throughput": 1.2,
    "mean_work_s": 2.0,
    "utilization": 0.3,
}


pytestmark = pytest.mark.usefixtures("log_stays_ours")


@pytest.fixture
def serve_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Capture Serve's logger, which does not propagate."""
    log = logging.getLogger("ray.serve")
    log.addHandler(caplog.handler)
    yield caplog
    log.removeHandler(caplog.handler)


def replica(name: str) -> ReplicaID:
    return ReplicaID(name, DEPLOYMENT)


def context(
    reports: dict[str, dict[str, Any]] | None = None,
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
    """Build a context from load reports that are ``age_s`` old. The reporting replicas run, unless
    ``running`` names others."""
    reports = reports or {}
    running = list(reports) if running is None else running
    raw: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = {}
    for name, load in reports.items():
        for metric, value in load.items():
            before = TimeStampedValue(at_s - age_s - 1, 1e9)
            latest = TimeStampedValue(at_s - age_s, value)
            raw.setdefault(metric, {})[replica(name)] = [before, latest]
    # A context has the interval only in the config, where it is deprecated.
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
        aggregated_metrics=lambda: pytest.fail("the policy must not read an average over the past"),
        raw_metrics=lambda: raw,
        capacity_adjusted_min_replicas=bounds[0],
        capacity_adjusted_max_replicas=bounds[1],
        policy_state={},
        last_scale_up_time=last_scale_up_time,
        last_scale_down_time=None,
        current_time=at_s,
        config=config,
    )


def test_the_latest_report_of_each_replica_counts() -> None:
    load = load_of(context({"a": LOAD, "b": LOAD | {"backlog_s": 7.0}}, queued=2.0, target=3))
    assert (load.at_s, load.running, load.target, load.queued_requests) == (NOW, 2, 3, 2.0)
    first = ReplicaLoad(
        backlog_s=3.0,
        arrival_rate=0.4,
        throughput=1.2,
        mean_work_s=2.0,
        batch_backlog_s=0.5,
        utilization=0.3,
    )
    assert load.reports[0] == first
    assert load.reports[1].backlog_s == 7.0


@pytest.mark.parametrize(
    "reports",
    [
        {},
        {name: value for name, value in LOAD.items() if name != "throughput"},
        LOAD | {"backlog_s": math.nan},
        LOAD | {"throughput": 0.0},
    ],
)
def test_a_replica_with_an_incomplete_report_is_ignored(reports: dict[str, float]) -> None:
    load = load_of(context({"a": LOAD, "b": reports}))
    assert load.running == 2
    assert len(load.reports) == 1


def test_an_old_report_is_ignored() -> None:
    assert len(load_of(context({"a": LOAD}, age_s=9)).reports) == 1
    assert not load_of(context({"a": LOAD}, age_s=31)).reports
    assert not load_of(context({"a": LOAD}, age_s=11, metrics_interval_s=1)).reports
    # A clock that is ahead does not invalidate a report.
    assert load_of(context({"a": LOAD}, age_s=-5)).reports


def test_a_stopped_replica_is_not_counted() -> None:
    load = load_of(context({"a": LOAD, "gone": LOAD}, running=["a"]))
    assert len(load.reports) == 1


def test_the_bounds_are_those_of_serve() -> None:
    busy = {"a": LOAD | {"backlog_s": 10_000.0}}
    assert WorkPolicy()(context(busy, bounds=(1, 4))) == (4, {})
    assert WorkPolicy()(context(busy, bounds=(1, 7))) == (7, {})
    assert WorkPolicy()(context({}, bounds=(2, 7)))[0] == 2


def test_the_policy_uses_its_scaling_parameters() -> None:
    reports = {"a": LOAD | {"backlog_s": 600.0, "arrival_rate": 0.0}}
    patient = WorkPolicy(target_drain_s=600)(context(reports))[0]
    assert WorkPolicy(target_drain_s=30, cold_start_s=1)(context(reports))[0] > patient


def test_each_change_of_the_number_logs_one_line(serve_log: pytest.LogCaptureFixture) -> None:
    serve_log.set_level(logging.INFO, "ray.serve")
    policy = WorkPolicy(hold_s=0, cold_start_s=1, target_drain_s=120)
    for call in range(50):
        policy(context({"a": LOAD}, at_s=NOW + call / 10))
    for call in range(50, 100):
        busy = {"a": LOAD | {"backlog_s": 150.0}}
        policy(context(busy, at_s=NOW + call / 10, target=3 if call > 50 else 1))
    lines = [record.getMessage() for record in serve_log.records]
    assert len(lines) == 2, lines
    assert lines[0].startswith("diffusion-serve/Generator: 1 replicas, by arrivals: running 1, ")
    assert "by backlog" in lines[1]
    assert "waiting_s 150" in lines[1]


def test_missing_reports_are_logged_once(serve_log: pytest.LogCaptureFixture) -> None:
    policy = WorkPolicy()

    def warnings(of: int) -> int:
        return serve_log.text.count(f"1 of {of} replicas have sent no fresh load report for 60 s")

    both = dict.fromkeys("ab", LOAD)
    for second in range(60):  # as long as a normal start
        policy(context({"a": LOAD}, running=["a", "b"], at_s=NOW + second))
    assert not warnings(2)
    policy(context(both, at_s=NOW + 60))
    for second in range(61, 300):
        policy(context({"a": LOAD}, running=["a", "b"], at_s=NOW + second))
    assert warnings(2) == 1
    policy(context(both, at_s=NOW + 300))
    for second in range(301, 400):
        policy(context(both, running=["a", "b", "c"], at_s=NOW + second))
    assert warnings(3) == 1


def test_a_first_replica_that_serve_started_is_kept_without_waiting_requests() -> None:
    policy = WorkPolicy(cold_start_s=100, hold_s=0)
    assert policy(context(at_s=NOW))[0] == 0
    up = {"last_scale_up_time": NOW + 1, "target": 1}
    assert policy(context(at_s=NOW + 30, **up))[0] == 1  # type: ignore[arg-type]
    assert policy(context(at_s=NOW + 300, **up))[0] == 1  # type: ignore[arg-type]
    assert policy(context(at_s=NOW + 600, **up))[0] == 0  # type: ignore[arg-type]


def test_a_first_start_that_serve_decided_is_measured() -> None:
    policy = WorkPolicy(cold_start_s=100)
    policy(context(at_s=NOW))
    # Serve starts the first replica without calling the policy.
    up = {"last_scale_up_time": NOW + 1, "target": 1}
    policy(context({"a": LOAD}, at_s=NOW + 31, **up))  # type: ignore[arg-type]
    assert policy.state.cold_start_s == pytest.approx(30)
    assert not policy.state.starts


def test_a_start_before_the_first_decision_is_not_measured() -> None:
    policy = WorkPolicy()
    policy(context({"a": LOAD}, last_scale_up_time=NOW - 5_000))
    assert policy.state.cold_start_s is None


def test_the_first_decision_keeps_the_running_replicas() -> None:
    idle = dict.fromkeys("abc", LOAD | {"backlog_s": 0.0, "arrival_rate": 0.0})
    policy = WorkPolicy(hold_s=20, cold_start_s=1)
    assert policy(context(idle))[0] == 3
    assert policy(context(idle, at_s=NOW + 19))[0] == 3
    assert policy(context(idle, at_s=NOW + 21))[0] < 3


def test_a_start_that_the_policy_decided_is_measured_once() -> None:
    policy = WorkPolicy(cold_start_s=10, target_drain_s=10)
    busy = {"a": LOAD | {"backlog_s": 40.0}}
    wanted, _ = policy(context(busy, bounds=(0, 3)))
    assert wanted == 3
    up = {"target": 3, "last_scale_up_time": NOW + 0.05, "bounds": (0, 3)}
    policy(context(busy, at_s=NOW + 0.1, **up))  # type: ignore[arg-type]
    assert [start.at_s for start in policy.state.starts] == [NOW]
    reports = dict.fromkeys("abc", LOAD)
    policy(context(reports, at_s=NOW + 20, **up))  # type: ignore[arg-type]
    assert policy.state.cold_start_s == pytest.approx(20)


def test_serve_builds_the_policy_from_a_config_file() -> None:
    written = AutoscalingPolicy(policy_function=WORK_POLICY, policy_kwargs={"target_drain_s": 5})
    # The controller gets a class pickled by value, distinct from the imported one.
    built = AutoscalingPolicy.from_serialized_policy_def(
        written.model_dump(), written.get_serialized_policy_def() or b""
    ).get_policy()
    policy = built(**written.policy_kwargs)
    assert policy(context({"a": LOAD | {"backlog_s": 100.0}}))[0] > 1


def test_a_wrong_parameter_is_logged_and_the_defaults_apply(
    serve_log: pytest.LogCaptureFixture,
) -> None:
    policy = WorkPolicy(target_drain=5)
    assert "policy_kwargs.target_drain: unknown key; known are" in serve_log.text
    assert policy(context({"a": LOAD | {"backlog_s": 10_000.0}}))[0] == 10
