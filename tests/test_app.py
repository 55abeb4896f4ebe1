"""The application as Serve builds it, without running it."""

import pytest

from serve_app.app import build
from serve_app.deadlines import GRACE_S
from serve_app.errors import ConfigError


def test_stopping_replicas_may_finish_their_requests() -> None:
    """In a gateway, a request may wait for a starting replica before it is generated."""
    args = {"engine": {"limits": {"max_deadline_s": 45}}, "gateway": {"max_hold_s": 200}}
    gateway = build(args)._bound_deployment
    [_, generator] = gateway.init_args
    graces_s = [
        deployment._deployment_config.graceful_shutdown_timeout_s
        for deployment in (generator._bound_deployment, gateway)
    ]
    assert graces_s == [45 + GRACE_S, 200 + 45 + GRACE_S]


def test_gateways_avoid_nodes_that_come_and_go() -> None:
    gateway = build({})._bound_deployment
    assert gateway.ray_actor_options["label_selector"] == {"diffusion-serve/gateway": "!no"}


def test_blocking_without_a_safety_checker_stops_before_any_replica_starts() -> None:
    with pytest.raises(ConfigError, match="'demo' has no safety checker"):
        build({"gateway": {"safety": "block"}})
