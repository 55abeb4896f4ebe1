"""Applications with several models: their configuration, without running anything."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.config.deployment_names import generator_names
from serve_app.config.models import AppConfig, parse_app_config
from serve_app.config.prechecks import check_models
from serve_app.config.serve_file import IMPORT_PATH, choose_generator, read_generators
from serve_app.errors import ConfigError

TWO: dict[str, Any] = {"models": [{"id": "a", "path": "/a"}, {"id": "b", "path": "/b"}]}


def test_each_model_has_a_configuration_of_its_own() -> None:
    config = parse_app_config(
        {
            "engine": {"max_batch_size": 4},
            "models": [
                {"id": "a", "path": "/a", "default_steps": 7},
                {"id": "b", "path": "/b", "engine": {"max_running": 2}},
            ],
            "gateway": {
                "safety": "off",
                "model_aliases": {"x": "a", "dall-e-*": "b"},
                "storage": {"url": "file:///images", "default_for": ["*", "x", "dall-e-3"]},
            },
        }
    )
    assert config.ids == ("a", "b")
    first, second = config.each_model()
    assert (first.model.id, first.model.source, first.model.default_steps) == ("a", "/a", 7)
    assert (first.engine.max_batch_size, second.engine.max_batch_size) == (4, 16)
    assert (first.engine.max_running, second.engine.max_running) == (32, 2)
    assert first.gateway.model_aliases == {"x": "a"}
    assert second.gateway.model_aliases == {"dall-e-*": "b"}
    assert first.gateway.storage.default_for == ("*", "x")
    assert second.gateway.storage.default_for == ("*", "dall-e-3")
    assert {one.gateway.safety for one in (first, second)} == {"off"}
    # The same as a configuration that has this model alone, so that a kept profile fits both.
    alone = parse_app_config({"model": {"id": "a", "path": "/a", "default_steps": 7}})
    assert first.model == alone.model
    assert first.model.model_dump(exclude_unset=True) == alone.model.model_dump(exclude_unset=True)


def test_the_short_form_is_one_model() -> None:
    config = AppConfig()
    assert config.ids == ("demo",)
    assert config.each_model() == (config,)
    assert config.generators == ("Generator",)


def test_a_model_does_not_depend_on_the_others() -> None:
    """A replica gets no setting of other models, although Serve restarts it if those change."""
    before = parse_app_config(TWO)
    changed = {"id": "b", "path": "/b", "default_steps": 3}
    aliases = {"model_aliases": {"y": "b"}}
    after = parse_app_config({"models": [TWO["models"][0], changed], "gateway": aliases})
    assert before.each_model()[0] == after.each_model()[0]
    assert before.each_model()[1] != after.each_model()[1]


@pytest.mark.parametrize("shared", ["auto", "none"])
def test_models_may_share_what_is_no_file_of_a_profile(shared: str) -> None:
    config = parse_app_config({**TWO, "engine": {"profile_path": shared}})
    assert {one.engine.profile_path for one in config.each_model()} == {shared}


def test_any_name_of_a_model_may_get_links_where_any_name_is_accepted() -> None:
    gateway = {"any_model": True, "storage": {"url": "file:///images", "default_for": ["other"]}}
    for one in parse_app_config({**TWO, "gateway": gateway}).each_model():
        assert one.gateway.storage.default_for == ("other",)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({**TWO, "model": {"id": "c"}}, "model and models are both set: leave model out"),
        ({"models": []}, "models: .*at least 1 item"),
        ({"models": [{"id": "a"}, {"id": "a"}]}, "models has two entries with the id 'a'"),
        (
            {"models": [{"id": "o/a"}, {"id": "o-a"}]},
            "'o/a' and 'o-a', and both deployments would have the name 'Generator-o-a'",
        ),
        ({"models": [{"id": "a", "stepz": 1}]}, "models.0.stepz: unknown key; known are id, path"),
        (
            {"models": [{"id": "a", "engine": {"limits": {"x": 1}}}]},
            "models.0.engine.limits.x: unknown key; known are max_pixels",
        ),
        (
            {"models": [{"id": "a"}, {"id": "b", "components": {"vae": None}}]},
            "models.1.components: .*|model.components.vae is null",
        ),
        (
            {"models": [{"id": "a"}, {"id": "b", "path": "/b", "base": "/c"}]},
            "  models.1: model.base is '/c'",
        ),
        (
            {
                "models": [
                    {"id": "a"},
                    {"id": "b", "default_steps": 9, "engine": {"limits": {"max_steps": 8}}},
                ]
            },
            "models.1.default_steps is 9, over engine.limits.max_steps, 8",
        ),
        (
            {**TWO, "engine": {"profile_path": "/p.json"}},
            "the models 'a' and 'b' share the engine.profile_path '/p.json'",
        ),
        (
            {
                "models": [
                    {"id": "a", "engine": {"profile_path": "/p.json"}},
                    {"id": "b", "engine": {"profile_path": "/p.json"}},
                ]
            },
            "Give each a file of its own in the engine of its entry, or leave it 'auto'",
        ),
        (
            {**TWO, "gateway": {"model_aliases": {"x": "c"}}},
            "model_aliases.x is 'c', and models has 'a', 'b'",
        ),
        (
            {**TWO, "gateway": {"model_aliases": {"b": "a"}}},
            "model_aliases.b is 'a', and models has an entry with the id 'b'",
        ),
        (
            {**TWO, "gateway": {"storage": {"url": "file:///images", "default_for": ["c"]}}},
            "default_for has 'c', which is no name of a model: there are 'a', 'b'",
        ),
    ],
)
def test_wrong_models_are_explained(args: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_app_config(args)


def test_names_of_deployments() -> None:
    assert generator_names(["a", "org/name v1.5#x"]) == ("Generator-a", "Generator-org-name-v1.5-x")
    first = parse_app_config({"models": TWO["models"][:1]})
    assert first.generators == parse_app_config(TWO).generators[:1] == ("Generator-a",)


def test_a_mistake_in_files_names_the_model(tmp_path: Path) -> None:
    config = parse_app_config({"models": [{"id": "demo"}, {"id": "b", "path": str(tmp_path)}]})
    with pytest.raises(ConfigError, match=f"^model 'b': {tmp_path} "):
        check_models(config)


def test_every_model_with_a_mistake_is_named_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    config = parse_app_config(
        {
            "models": [
                {"id": "a", "path": str(tmp_path / "a")},
                {"id": "b", "path": str(tmp_path / "b")},
                {"id": "demo"},
                {"id": "c", "loras": {"x": "/no.safetensors"}},
            ]
        }
    )
    with pytest.raises(ConfigError) as raised:
        check_models(config)
    first, *lines = str(raised.value).splitlines()
    assert first == "3 models are wrong:"
    for line, name in zip(lines, ("a", "b", "c"), strict=True):
        assert line.startswith(f"  model '{name}': ")
        assert line.count(repr(name)) == 1


def _written(path: Path, *deployments: dict[str, Any]) -> Path:
    application = {"import_path": IMPORT_PATH, "args": TWO, "deployments": list(deployments)}
    path.write_text(yaml.safe_dump({"applications": [application]}))
    return path


def test_each_model_has_its_own_deployment_in_a_serve_config(tmp_path: Path) -> None:
    path = _written(
        tmp_path / "serve.yaml",
        {"name": "Gateway"},
        {"name": "Generator-b", "num_replicas": 2, "ray_actor_options": {"num_gpus": 0.5}},
    )
    first, second = read_generators(path)
    assert (first.deployment, first.autoscaling, first.num_gpus) == ("Generator-a", {}, None)
    assert second.autoscaling == {"min_replicas": 2, "max_replicas": 2}
    assert (second.config.model.id, second.num_gpus) == ("b", 0.5)
    assert choose_generator(path, None) == first
    assert choose_generator(path, "b") == second
    with pytest.raises(ConfigError, match="has no model 'c'; it has 'a', 'b'"):
        choose_generator(path, "c")


def test_settings_of_a_deployment_that_is_not_there_are_rejected(tmp_path: Path) -> None:
    path = _written(tmp_path / "serve.yaml", {"name": "Generator"})
    with pytest.raises(
        ConfigError,
        match="deployments has the name 'Generator'; the application has 'Generator-a', "
        "'Generator-b', 'Gateway'",
    ):
        read_generators(path)
