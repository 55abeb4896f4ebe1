import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from serve_app.config.environment import (
    ALLOCATOR_SETTINGS,
    ALLOCATOR_VARIABLE,
    DASHBOARD_VARIABLE,
    OLDER_ALLOCATOR_VARIABLES,
    set_defaults_of_processes,
)
from serve_app.config.gateway import GatewayConfig
from serve_app.config.model_files import check_model_folder
from serve_app.config.models import AppConfig, ModelConfig, parse_app_config
from serve_app.config.serve_file import (
    SERVE_DELAYS_S,
    WORK_POLICY,
    foreign_policy,
    policy_kwargs,
    read_generators,
    read_serve_config,
)
from serve_app.config.source import DEMO_MODEL_DIR
from serve_app.errors import ConfigError
from tests.serve_configs import SERVE_CONFIGS


@pytest.mark.parametrize("path", SERVE_CONFIGS, ids=lambda path: path.name)
def test_the_shipped_configs_are_valid(path: Path) -> None:
    [config] = read_serve_config(path)
    check_model_folder(config.model)


def test_every_key_has_a_default() -> None:
    config = parse_app_config({})
    assert config == AppConfig()
    assert config.model.source == str(DEMO_MODEL_DIR)
    check_model_folder(config.model)


def test_configs_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        AppConfig().model.id = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"modle": {}}, ["modle: unknown key", "model, engine"]),
        ({"engine": {"limits": {"max_stepz": 3}}}, ["engine.limits.max_stepz", "max_steps"]),
        ({"engine": {"max_batch_size": 0}}, ["engine.max_batch_size", "greater", "given: 0"]),
        ({"model": {"dtype": "int8"}}, ["model.dtype", "'float32'", "given: 'int8'"]),
        ({"gateway": {"safety": "on"}}, ["gateway.safety", "'flag', 'block' or 'off'"]),
        ({"model": {"default_size_px": [64]}}, ["model.default_size_px"]),
        ({"model": {"default_steps": 101}}, ["default_steps is 101", "max_steps, 100"]),
        ([], ["args"]),
        (None, ["args"]),
    ],
)
def test_errors_name_the_wrong_key(args: object, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_app_config(args)
    for word in words:
        assert word in str(caught.value)


def test_the_source_of_a_model(tmp_path: Path) -> None:
    assert ModelConfig(id="org/name").source == "org/name"
    assert not ModelConfig(id="org/name").is_local
    assert ModelConfig(id="m", path="org/name").source == "org/name"
    assert ModelConfig(id="m", path=str(tmp_path)).source == str(tmp_path)
    assert ModelConfig(id="m", path="./x").source == str(Path("x").resolve())
    file = ModelConfig(id="m", path="./x.safetensors")
    assert file.is_single_file
    assert file.layout is None
    assert file.model_copy(update={"base": "org/name"}).layout == "org/name"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"path": "/models/x", "base": "/b"}, "model.base is '/b', and /models/x is no"),
        ({"path": "/x.safetensors", "variant": "fp16"}, "leave model.variant out"),
        ({"path": "models/x.safetensors"}, "as owner/name/file.safetensors"),
        ({"components": {"vae": None}}, "components.vae is null, and no image"),
        ({"components": {"vae": "vae"}}, "components.vae is 'vae': write a path"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused(model: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_app_config({"model": {"id": "m"} | model})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: [", "not YAML"),
        ("- 1", "no application"),
        ("applications: 3", "no application"),
        ("applications: [{import_path: other:app}]", "no application"),
        ("applications: [{import_path: 'serve_app.app:build', args: {x: 1}}]", "x: unknown key"),
    ],
)
def test_a_wrong_serve_config_is_explained(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_serve_config(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_serve_config(tmp_path / "none.yaml")


def test_the_kwargs_of_the_policy_are_found(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"

    def write(policy: object) -> None:
        scaling = {"min_replicas": 0, "policy": policy} | dict.fromkeys(SERVE_DELAYS_S, 0)
        deployments = [{"name": "Gateway"}, {"name": "Generator", "autoscaling_config": scaling}]
        ours = {"import_path": "serve_app.app:build", "deployments": deployments}
        path.write_text(yaml.safe_dump({"applications": [ours]}))

    def kwargs() -> dict[str, object]:
        [generator] = read_generators(path)
        assert generator.autoscaling["min_replicas"] == 0
        return policy_kwargs(generator.autoscaling)

    write({"policy_function": WORK_POLICY, "policy_kwargs": {"hold_s": 3}})
    assert kwargs() == {"hold_s": 3}
    write({"policy_function": WORK_POLICY})
    assert kwargs() == {}
    for other in (None, {"policy_function": "another:policy", "policy_kwargs": {"x": 1}}):
        write(other)
        assert kwargs() == {}
    write({"policy_function": WORK_POLICY, "policy_kwargs": [3]})
    with pytest.raises(ConfigError, match=r"policy_kwargs must be a mapping; it is \[3\]"):
        kwargs()
    write([3])
    with pytest.raises(ConfigError, match="must be mappings"):
        kwargs()


@pytest.mark.parametrize("late", SERVE_DELAYS_S)
def test_delays_of_serve_are_rejected(late: str) -> None:
    ours = {"policy": {"policy_function": WORK_POLICY}} | dict.fromkeys(SERVE_DELAYS_S, 0)
    assert policy_kwargs(ours) == {}
    default = f"{late} is {SERVE_DELAYS_S[late]}, Serve's default where it is not set: .* to 0"
    with pytest.raises(ConfigError, match=default):
        policy_kwargs({name: value for name, value in ours.items() if name != late})
    with pytest.raises(ConfigError, match=f"{late} is 5: Serve waits"):
        policy_kwargs(ours | {late: 5})
    theirs = {"policy": {"policy_function": "another:policy"}}
    assert policy_kwargs(theirs) == {}


def test_another_policy_is_named() -> None:
    assert foreign_policy({}) is None
    assert foreign_policy({"policy": {"policy_function": WORK_POLICY}}) is None
    assert foreign_policy({"policy": {"policy_function": "another:policy"}}) == "another:policy"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"loras": {"ink": "ink.safetensors"}}, "owner/name"),
        ({"loras": {"ink": "me/loras/ink.bin"}}, "only .safetensors"),
        ({"lora_folder": "~/loras", "speed": {"compile": True}}, "exclude each other"),
        ({"lora_folder": "~/loras", "speed": {"quantize": "int8"}}, "exclude each other"),
        ({"lora_source": "loras"}, "a folder that starts with"),
        ({"lora_source": "https://example.com/loras"}, "a folder that starts with"),
        ({"lora_source": "s3:///loras"}, "names no bucket"),
        ({"lora_source": "s3://bucket/a/../b"}, "without '..'"),
        ({"lora_source": "s3://me:secret@bucket/a"}, "leave out user"),
        ({"lora_source": []}, "empty list"),
        ({"lora_source": ["styles"]}, "owner/name"),
        ({"lora_source": ["*/styles"]}, "owner/name"),
        ({"lora_source": ["me/styles/ink"]}, "owner/name"),
        ({"lora_source": "/loras", "speed": {"compile": True}}, "exclude each other"),
        ({"lora_source": "/loras", "speed": {"offload": "model"}}, "moves weights"),
        (
            {"lora_folder": "~/l", "call_kwargs": {"cross_attention_kwargs": {"scale": 1}}},
            "requests name their scales",
        ),
    ],
)
def test_unusable_adapters_are_rejected(model: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        parse_app_config({"model": model})
    assert "secret" not in str(raised.value)


def test_there_is_room_for_the_adapters_of_one_request() -> None:
    engine = {"max_loaded_loras": 2, "limits": {"max_loras": 3}}
    assert parse_app_config({"engine": engine})  # no source, no room needed
    with pytest.raises(ConfigError, match="max_loaded_loras is 2"):
        parse_app_config({"model": {"lora_source": "/loras"}, "engine": engine})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"device": "cpu", "speed": {"offload": "model"}}, "speed.offload needs a GPU.*'cpu'"),
        ({"device": "cpu", "speed": {"cuda_graphs": True}}, "speed.cuda_graphs needs a GPU.*'cpu'"),
        ({"speed": {"cuda_graphs": True, "offload": "model"}}, "weights that stay in place"),
    ],
)
def test_options_for_a_gpu_are_rejected_where_they_cannot_work(
    model: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_app_config({"model": model})


def test_tracing_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_app_config({"gateway": {"tracing": True}}).gateway.tracing
    exporter = "opentelemetry.exporter.otlp.proto.http"
    monkeypatch.delitem(sys.modules, exporter, raising=False)  # earlier tests import it
    monkeypatch.setitem(sys.modules, exporter.rpartition(".")[0], None)
    with pytest.raises(ConfigError, match=r"pip install 'diffusion-serve\[tracing\]'"):
        parse_app_config({"gateway": {"tracing": True}})
    assert not parse_app_config({}).gateway.tracing


def test_the_environment_may_name_the_key_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert GatewayConfig().keys_file is None
    monkeypatch.setenv("DIFFUSION_SERVE_KEYS_PATH", "/etc/diffusion-serve/keys.yaml")
    assert GatewayConfig().keys_file == Path("/etc/diffusion-serve/keys.yaml")
    assert GatewayConfig(keys_path="/mine.yaml").keys_file == Path("/mine.yaml")


@pytest.mark.parametrize(("own", "expected"), [(None, 300), ("20", 20)])
def test_rays_dashboard_gets_more_time_unless_a_user_says_otherwise(
    own: str | None, expected: int
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != DASHBOARD_VARIABLE}
    command = """
from pathlib import Path
import serve_app.cli.main
from serve_app.cli.check import check_serve_file
check_serve_file(Path("configs/demo.yaml"))
from serve_app.config.environment import set_defaults_of_processes
set_defaults_of_processes()
from ray._private.ray_constants import RAY_DASHBOARD_STARTUP_TIMEOUT_S
print(RAY_DASHBOARD_STARTUP_TIMEOUT_S)
"""
    printed = subprocess.check_output(
        [sys.executable, "-c", command],
        env=environment | ({} if own is None else {DASHBOARD_VARIABLE: own}),
        text=True,
    )
    assert int(printed) == expected


@pytest.mark.parametrize("own", [None, *OLDER_ALLOCATOR_VARIABLES, ALLOCATOR_VARIABLE])
def test_the_allocators_settings_of_a_user_are_kept(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (*OLDER_ALLOCATOR_VARIABLES, ALLOCATOR_VARIABLE)
    kept = {name: value for name, value in os.environ.items() if name not in names}
    environment = kept | ({} if own is None else {own: "backend:native"})
    monkeypatch.setattr(os, "environ", environment)
    set_defaults_of_processes()
    expected = {ALLOCATOR_VARIABLE: ALLOCATOR_SETTINGS} if own is None else {own: "backend:native"}
    assert {name: value for name, value in environment.items() if name in names} == expected
