"""The simulator's copy of Serve's default policy decides as Serve does."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve import autoscaling_policy
from ray.serve._private.common import DeploymentID
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from serve_app.config.serve_file import SERVE_DELAYS_S
from serve_app.planner.serve_policy import QueueParams, QueuePolicy


def test_the_defaults_are_those_that_serve_ships() -> None:
    shipped, ours = AutoscalingConfig(), QueueParams()
    assert ours.min_replicas == shipped.min_replicas
    assert ours.max_replicas == shipped.max_replicas
    assert ours.target_ongoing_requests == shipped.get_target_ongoing_requests()
    assert ours.upscale_delay_s == shipped.upscale_delay_s
    assert ours.downscale_delay_s == shipped.downscale_delay_s
    assert ours.look_back_period_s == shipped.look_back_period_s
    assert ours.metrics_interval_s == shipped.metrics_interval_s
    assert {name: getattr(shipped, name) for name in SERVE_DELAYS_S} == SERVE_DELAYS_S


requests_seen = st.integers(0, 160).map(lambda quarters: quarters / 4)


@given(
    st.lists(st.tuples(st.floats(0.1, 20), requests_seen, st.integers(0, 3)), max_size=40),
    st.sampled_from([0.5, 1.0, 2.0, 3.0]),
    st.sampled_from([0.0, 10.0, 30.0]),
    st.sampled_from([0.0, 30.0, 60.0]),
)
def test_the_same_decisions(
    reports: list[tuple[float, float, int]], ongoing: float, up_s: float, down_s: float
) -> None:
    params = QueueParams(0, 20, ongoing, up_s, down_s)
    config = AutoscalingConfig(
        min_replicas=0,
        max_replicas=20,
        target_ongoing_requests=ongoing,
        upscale_delay_s=up_s,
        downscale_delay_s=down_s,
    )
    serve: Any = autoscaling_policy._apply_autoscaling_config(
        autoscaling_policy.replica_queue_length_autoscaling_policy
    )
    ours = QueuePolicy(params)
    now, state, target, starting = 0.0, {}, 1, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoscaling_policy, "time", SimpleNamespace(time=lambda: now))
        for passed_s, requests, late in reports:
            now += passed_s
            running = max(0, target - min(late, starting))
            context = AutoscalingContext(
                deployment_id=DeploymentID("Generator", "app"),
                deployment_name="Generator",
                app_name="app",
                current_num_replicas=running,
                target_num_replicas=target,
                running_replicas=[],
                total_num_requests=requests,
                total_queued_requests=0.0,
                aggregated_metrics={},
                raw_metrics={},
                capacity_adjusted_min_replicas=0,
                capacity_adjusted_max_replicas=20,
                policy_state=state,
                last_scale_up_time=None,
                last_scale_down_time=None,
                current_time=now,
                config=config,
            )
            wanted, state = serve(context)
            wanted = max(0, min(20, wanted))
            assert ours.decide(now, running, target, requests) == wanted
            starting = max(0, wanted - target)
            target = wanted
