"""The reference pages have everything that the code has, and take it from the code."""

import ast
import inspect
import re
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)

import serve_app
from serve_app.autoscaling.params import BOUNDS
from serve_app.autoscaling.policy import ScalingParams
from serve_app.config import environment
from serve_app.config.serve_file import SERVE_DELAYS_S
from serve_app.errors import Cancelled, ConfigError
from serve_app.gateway.auth import ApiKey
from serve_app.gateway.routes import EDITS
from serve_app.metrics.labels import OUTCOMES
from tests.docs.pages import FOLDER, rendered, source
from tools.docs.markdown import named
from tools.docs.reference import http_api
from tools.docs.reference.cli import commands, options
from tools.docs.reference.configuration import sections
from tools.docs.reference.docstrings import attribute_docstrings
from tools.docs.reference.errors import errors, meaning
from tools.docs.reference.json_schema import default_of, range_of, type_of, value_of
from tools.docs.reference.modules import summary

ROOT = Path(__file__).parents[2]
MOST_WORDS = 25
"""Words of a sentence, by the rules for English."""


def _row(page: str, name: str) -> str:
    """Return the row of a name on a page, outside the section of API key entries."""
    before, _, after = rendered(f"reference/{page}").partition("\n## API key entries\n")
    others = before + after.partition("\n## ")[2]
    [row] = [line for line in others.splitlines() if line.startswith(f"| `{name}` |")]
    return row


def _check_english(text: str | None, where: str) -> None:
    assert text, f"{where} has no description"
    assert text.rstrip().endswith("."), f"{where}: no full stop: {text}"
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        assert len(sentence.split()) <= MOST_WORDS, f"{where}: {sentence}"


# ---- configuration -------------------------------------------------------------------------------


def _keys() -> Iterator[tuple[str, Any]]:
    for path, model in sections():
        for name, field in model.model_fields.items():
            if not hasattr(field.annotation, "model_fields"):
                yield (f"{path}.{name}" if path else name), field


def test_the_configuration_has_every_key_with_its_description() -> None:
    keys = dict(_keys())
    assert {"engine.limits.max_pixels", "model.speed.compile", "gateway.tracing"} < keys.keys()
    for key, field in keys.items():
        _check_english(field.description, key)
        assert named(field.description) in _row("configuration", key)


def test_every_section_of_the_configuration_is_introduced() -> None:
    for path, model in sections():
        _check_english(model.__doc__, model.__name__)
        assert not path or f"### `{path}`\n" in rendered("reference/configuration")


def test_the_configuration_has_defaults_and_ranges() -> None:
    assert "| number; > 0; default `30.0` |" in _row("configuration", "engine.max_backlog_s")
    assert "| list of 2 integers; 8 to 16,384 |" in _row("configuration", "model.default_size_px")


def test_the_configuration_has_every_scaling_parameter() -> None:
    meanings = attribute_docstrings(ScalingParams)
    for field in fields(ScalingParams):
        _check_english(meanings.get(field.name), field.name)
        if field.name not in BOUNDS:
            assert f"`{field.default}`" in _row("configuration", field.name)


def test_the_configuration_has_every_field_of_an_api_key() -> None:
    for name, field in ApiKey.model_fields.items():
        _check_english(field.description, name)
        section = rendered("reference/configuration").split("\n## API key entries\n")[1]
        assert f"\n| `{name}` | " in section.split("\n## ")[0]


def test_the_configuration_has_every_environment_variable() -> None:
    read = re.findall(r'^\w+_VARIABLE = "(\w+)"', inspect.getsource(environment), re.MULTILINE)
    assert "DIFFUSION_SERVE_KEYS_PATH" in read
    for name in (*read, *environment.MACHINE_VARIABLES):
        row = _row("configuration", name)
        _check_english(row.split("|")[2].strip(), name)
    for prefix in environment.GENERATION_PREFIXES:
        assert f"`{prefix}*`" in rendered("reference/configuration")


def test_only_one_module_reads_the_environment() -> None:
    """So that the page has every variable."""
    readers = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "serve_app").rglob("*.py")
        if re.search(r"os\.(environ\b|getenv)", path.read_text(encoding="utf-8"))
    }
    assert readers == {"serve_app/config/environment.py"}


_SERVE_SCHEMAS: dict[str, Any] = {
    "http_options": HTTPOptionsSchema,
    "applications": ServeApplicationSchema,
    "applications.deployments": DeploymentSchema,
    "applications.deployments.ray_actor_options": RayActorOptionsSchema,
    "applications.deployments.autoscaling_config": AutoscalingConfig,
}


def _serve_rows() -> dict[str, str]:
    """Return the defaults of the keys of Ray Serve on the page, by key."""
    section = source("reference/configuration").split("\n## Serve keys\n")[1].split("\n## ")[0]
    rows = {}
    for part in section.split("\n### `")[1:]:
        parent = part.split("`")[0]
        found = re.findall(r"^\| `([a-z_.]+)` \| (.*?) \|", part, re.MULTILINE)
        rows |= {f"{parent}.{key}": default for key, default in found}
    return rows


def test_keys_of_ray_serve_exist_there_with_these_defaults() -> None:
    rows = _serve_rows()
    assert len(rows) > 15
    for key, default in rows.items():
        parent, _, name = key.rpartition(".")
        if parent.endswith(".policy"):  # a mapping in Ray 2.60
            assert name in ("policy_function", "policy_kwargs")
            continue
        field = _SERVE_SCHEMAS[parent].model_fields[name]
        if default == "required":
            assert field.is_required(), key
        elif default != "—" and _SERVE_SCHEMAS[parent] is not DeploymentSchema:
            assert yaml.safe_load(default.strip("`")) == field.default, key
    assert {"http_options", "applications"} < ServeDeploySchema.model_fields.keys()


def test_keys_of_ray_serve_that_configs_and_commands_use_are_on_the_page() -> None:
    rows = _serve_rows()
    scaling = "applications.deployments.autoscaling_config"
    assert {f"{scaling}.{name}" for name in (*SERVE_DELAYS_S, *BOUNDS)} <= rows.keys()
    for path in (ROOT / "configs").glob("*.yaml"):
        if path.name == "kustomization.yaml":
            continue
        for key in _leaves(yaml.safe_load(path.read_text(encoding="utf-8"))):
            inside = key.startswith(("applications.args.", f"{scaling}.policy.policy_kwargs."))
            known = next((one for one in rows if key.startswith(f"{one}.")), key)  # a mapping's
            assert inside or known in rows, f"{path}: {key}"


def _leaves(content: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _leaves(value, f"{prefix}.{name}" if prefix else name)
    elif isinstance(content, list) and content and isinstance(content[0], dict):
        for value in content:
            yield from _leaves(value, prefix)
    else:
        yield prefix


# ---- HTTP API ------------------------------------------------------------------------------------


def test_the_http_api_has_every_path_with_its_fields_and_responses() -> None:
    page = rendered("reference/http-api")
    for path, operations in http_api.document()["paths"].items():
        for method, operation in operations.items():
            section = page.split(f"\n## `{method.upper()} {path}`\n")[1].split("\n## ")[0]
            _check_english(operation["description"], path)
            for status, response in operation["responses"].items():
                assert f"| `{status}` | {response['description']} |" in section
            for body in operation.get("requestBody", {}).get("content", {}).values():
                for name, field in body["schema"]["properties"].items():
                    _check_english(field.get("description"), f"{path}, {name}")
                    if path == EDITS and name in http_api.shared_fields():
                        continue
                    needed = name in body["schema"]["required"]
                    assert f"\n| `{name}` | {value_of(field, needed)} |" in section
                    assert named(field["description"]) in section
            for parameter in operation.get("parameters", ()):
                assert parameter["description"] in section


def test_the_http_api_has_every_object_with_its_fields() -> None:
    page = rendered("reference/http-api")
    components = http_api.document()["components"]["schemas"]
    assert set(http_api.described_schemas()) == components.keys()
    for name, schema in components.items():
        section = page.split(f"\n### {name} ")[1].split("\n##")[0]
        for field, about in schema["properties"].items():
            _check_english(about.get("description", "."), f"{name}.{field}")
            assert f"| `{field}` |" in section, f"{name}.{field}"
            assert re.search(rf"^\| `{field}` \| .+ \| \S.* \|$", section, re.MULTILINE), field


def test_the_http_api_has_the_paths_that_are_not_in_the_openapi_document() -> None:
    paths = http_api.undescribed_paths()
    assert {"/", "/metrics", "/docs", "/openapi.json"} <= paths.keys()
    for path, about in paths.items():
        _check_english(about, path)
        assert _row("http-api", f"GET {path}")


def test_a_server_describes_no_status_that_it_never_returns() -> None:
    assert "422" not in str(http_api.document())


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "integer", "minimum": 1, "maximum": 4000.0}, ("integer", "1 to 4,000")),
        (
            {"anyOf": [{"type": "number", "exclusiveMinimum": 0.5}, {"type": "null"}]},
            ("number", "> 0.5"),
        ),
        ({"enum": ["a", "b"]}, ('`"a"`, `"b"`', "")),
        (
            {"type": "string", "minLength": 1, "maxLength": 9},
            ("text", "at most 9 characters, not empty"),
        ),
        (
            {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
            ("list of integers", "at most 3 items"),
        ),
        (
            {"type": "object", "additionalProperties": {"type": "number"}},
            ("mapping of names to numbers", ""),
        ),
        ({"$ref": "#/components/schemas/Usage"}, ("[Usage](#usage)", "")),
    ],
    ids=["bounds", "nullable", "choices", "text", "list", "mapping", "object"],
)
def test_schemas_become_readable_types(schema: dict[str, Any], expected: tuple[str, str]) -> None:
    assert (type_of(schema), range_of(schema)) == expected


def test_values_and_keys_in_descriptions_are_code() -> None:
    assert named("'auto' is the model's, under engine.limits. See HF_HOME.") == (
        "`auto` is the model's, under `engine.limits`. See `HF_HOME`."
    )
    assert named("`model.id` and the engine. Next") == "`model.id` and the engine. Next"


def test_the_largest_seed_is_readable() -> None:
    assert range_of({"minimum": 0, "maximum": float(2**63)}) == "0 to 2^63 - 1"


def test_defaults_are_shown_as_json() -> None:
    assert default_of({"default": False}, required=False) == "default `false`"
    assert default_of({"default": None}, required=False) == ""
    assert default_of({}, required=True) == "required"


# ---- command line --------------------------------------------------------------------------------


def test_the_command_line_has_every_command_with_its_exit_codes() -> None:
    assert commands().keys() >= {"serve", "check", "infer", "key", "plan", "doctor", "top"}
    for name, command in commands().items():
        section = _command_section(name)
        _check_english(inspect.cleandoc(command.help), name)
        assert re.search(r"Exit codes: 0 .*, 2 ", section), name


def test_the_command_line_has_every_argument_and_option_with_its_help() -> None:
    for command, name, about in options():
        _check_english(about, f"{command} {name}")
        assert f"\n| `{name}` |" in _command_section(command)
        assert named(re.sub(r"\s+", " ", about)) in _command_section(command)


def test_the_command_line_has_types_ranges_and_defaults() -> None:
    assert "| `--port` | integer, ≥ 1, ≤ 65535 | Port. " in _command_section("serve")
    assert "| `--failures-per-hour` | number; default `0.0` |" in _command_section("plan")
    assert "| `--device` | `auto`, `cpu`, `cuda` |" in _command_section("serve")
    assert "diffusion-serve infer --prompt TEXT [OPTIONS]" in _command_section("infer")
    assert "diffusion-serve key NAME [OPTIONS]" in _command_section("key")


def _command_section(name: str) -> str:
    page = rendered("reference/cli")
    return page.split(f"\n## `diffusion-serve {name}`\n")[1].split("\n## ")[0]


# ---- errors --------------------------------------------------------------------------------------


def test_the_errors_have_every_class_and_every_code() -> None:
    page = rendered("reference/errors")
    for kind in errors():
        _check_english(meaning(kind), kind.__name__)
        assert f"\n| `{kind.__name__}` |" in page
        assert meaning(kind) in page
        if not issubclass(kind, ConfigError | Cancelled):
            assert f"\n| {kind.status} | `{kind.code}`; `{kind.type}` |" in page, kind
    for code in OUTCOMES:
        assert code == "completed" or f"`{code}`" in page, code


def test_the_errors_have_the_headers_of_responses() -> None:
    lines = [line for line in rendered("reference/errors").splitlines() if "; " in line]
    rows = {" ".join(line.split(";")[0].strip("| ").split(" | ")): line for line in lines}
    assert rows["429 `overloaded`"].endswith("| yes, after the time in `Retry-After` |")
    assert rows["400 `invalid_value`"].endswith("| no; `x-should-retry: false` |")
    assert "`WWW-Authenticate: Bearer`" in rows["401 `invalid_api_key`"]
    failed = [line for line in lines if line.startswith("| 500 | `generation_failed`")]
    assert failed[0].endswith("| yes, once or twice |")
    assert failed[1].endswith("| no: it would fail again; `x-should-retry: false` |")


# ---- Python API, and all pages -------------------------------------------------------------------


def test_the_python_api_has_every_public_name() -> None:
    page = source("reference/python")
    for name in serve_app.__all__:
        assert re.search(rf"^::: serve_app[a-z_.]*\.{name}$", page, re.MULTILINE) or (
            f"`{name}`" in page
        ), name
    for event in ("Queued", "Progress", "Preview", "Completed", "Failed", "GenerationResult"):
        assert f"::: serve_app.protocol.events.{event}\n" in page


def test_nothing_generated_is_pasted_into_a_page() -> None:
    """Each page is short, and its tables come from a macro; only Serve's keys are written."""
    for path in (FOLDER / "reference").glob("*.md"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 200, path.name
        assert "{{ " in text or "::: " in text, path.name
        tables = re.findall(r"^\| --- ", text, re.MULTILINE)
        assert len(tables) == 3 * (path.name == "configuration.md"), path.name


# ---- architecture --------------------------------------------------------------------------------


def test_the_architecture_page_has_every_layer_of_the_import_contract() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    layers = [re.findall(r"serve_app\.(\w+)", layer) for layer in contracts[0]["layers"]]
    section = source("contribute/architecture").split("\n## Layers\n")[1].split("\n## ")[0]
    rows = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in section.splitlines() if "|" in row]
    shown = [name for row in rows for name in row]
    assert sorted(shown) == sorted(name for layer in layers for name in layer)
    order = {name: number for number, layer in enumerate(layers) for name in layer}
    assert [order[name] for name in shown] == sorted(order.values())


def test_the_architecture_page_has_every_module_with_its_sentence() -> None:
    page = rendered("contribute/architecture")
    for path in (ROOT / "serve_app").rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        section = page.split(f"\n### `{path.parent.relative_to(ROOT).as_posix()}/`\n")[1]
        section = section.split("\n##")[0]
        assert summary(path) in section, name
        assert path.name == "__init__.py" or f"| `{path.name}` |" in section, name


def test_every_module_begins_with_a_sentence() -> None:
    for path in (ROOT / "serve_app").rglob("*.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        first = docstring.split("\n")[0]
        assert first.endswith("."), f"{path}: {first!r}"
        assert re.match(r"(``)?[A-Za-z]", first), f"{path}: {first!r}"
        assert 3 <= len(first.split()) <= MOST_WORDS, f"{path}: {first!r}"
