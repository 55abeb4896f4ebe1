"""The application as Serve builds it, without running it."""

from pathlib import Path

import pytest

from serve_app.app import build
from serve_app.config.source import DEMO_MODEL_DIR
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


def test_each_of_several_models_has_a_deployment() -> None:
    models = [{"id": "demo"}, {"id": "a/b", "path": str(DEMO_MODEL_DIR)}]
    models[1] |= {"engine": {"limits": {"max_deadline_s": 45}}}  # type: ignore[dict-item]
    gateway = build({"models": models})._bound_deployment
    config, *generators = gateway.init_args
    bound = [one._bound_deployment for one in generators]
    assert [one.name for one in bound] == ["Generator-demo", "Generator-a-b"]
    assert [one.init_args[0].model.id for one in bound] == list(config.ids)
    graces_s = [one._deployment_config.graceful_shutdown_timeout_s for one in (*bound, gateway)]
    assert graces_s == [600 + GRACE_S, 45 + GRACE_S, 300 + 600 + GRACE_S]


def test_one_model_has_the_deployment_that_it_had() -> None:
    """Also the only entry of ``models``, whose name stays when another one joins it."""
    for args, name in (({}, "Generator"), ({"models": [{"id": "demo"}]}, "Generator-demo")):
        [_, generator] = build(args)._bound_deployment.init_args
        assert generator._bound_deployment.name == name


def test_one_wrong_folder_of_several_does_not_take_the_others_down(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = {"id": "b", "path": str(tmp_path)}
    [_, *generators] = build({"models": [{"id": "demo"}, wrong]})._bound_deployment.init_args
    assert len(generators) == 2
    assert f"model 'b': {tmp_path}" in caplog.text
    with pytest.raises(ConfigError, match="model 'b': "):
        build({"models": [wrong, {"id": "c", "path": str(tmp_path)}]})
