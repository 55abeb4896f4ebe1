"""The application as Serve builds it, without running it."""

from pathlib import Path
from typing import Any

import pytest

from serve_app.app import build, build_openai_app
from serve_app.config.openai_app import DeployedModel, OpenAIAppConfig
from serve_app.config.serve_file import WORK_POLICY
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


ON_CPU = {"num_gpus": 0, "num_cpus": 0.5}


def test_options_of_a_deployment_stand_beside_its_model() -> None:
    """As a dict or as objects. What is not given is as a config file without it has it."""
    scaled = {"ray_actor_options": ON_CPU, "autoscaling_config": {"min_replicas": 0}}
    ingress = {"num_replicas": 2, "graceful_shutdown_timeout_s": 5.0}
    models = [{"id": "demo"}, {"id": "b", "path": str(DEMO_MODEL_DIR), "deployment_config": scaled}]
    objects = OpenAIAppConfig(
        models=tuple(DeployedModel.model_validate(one) for one in models),
        ingress_deployment_config=ingress,
    )
    for args in (objects, {"models": models, "ingress_deployment_config": ingress}):
        gateway = build_openai_app(args)._bound_deployment
        [plain] = build({"models": [{"id": "demo"}]})._bound_deployment.init_args[1:]
        first, second = (one._bound_deployment for one in gateway.init_args[1:])
        assert first.ray_actor_options == plain._bound_deployment.ray_actor_options
        assert (second.name, second.ray_actor_options) == ("Generator-b", ON_CPU)
        scaling = second._deployment_config.autoscaling_config
        assert (scaling.min_replicas, scaling.max_replicas) == (0, 1)
        assert first._deployment_config.autoscaling_config is None
        assert gateway.num_replicas == 2
        assert gateway._deployment_config.graceful_shutdown_timeout_s == 5.0
        assert second._deployment_config.graceful_shutdown_timeout_s == 600 + GRACE_S


POLICY = {"policy": {"policy_function": WORK_POLICY}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ray_actor_options": {"num_gpu": 1}}, "'Generator-demo': .*'num_gpu'"),
        ({"num_replica": 2}, "'Generator-demo': .*'num_replica'"),
        ({"name": "x"}, "'Generator-demo': .*'name'"),
        ({"autoscaling_config": {"min_replicas": 3}}, "must be greater than or equal to min_rep"),
        ({"autoscaling_config": POLICY}, "upscale_delay_s is 30"),
    ],
)
def test_a_wrong_option_of_a_deployment_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_openai_app({"models": [{"id": "demo", "deployment_config": options}]})


def test_options_of_deployments_are_not_for_the_args_of_a_config_file() -> None:
    models = [{"id": "demo", "deployment_config": {}}]
    with pytest.raises(ConfigError, match=r"models\.0\.deployment_config: unknown key"):
        build({"models": models})
    with pytest.raises(ConfigError, match=r"models\.0\.x: unknown key; .*deployment_config"):
        build_openai_app({"models": [{"id": "demo", "x": 1}]})
    with pytest.raises(ConfigError, match="models: Field required"):
        build_openai_app({"model": {"id": "demo"}})
