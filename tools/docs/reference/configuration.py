"""The configuration page: the application's keys, the scaling policy's, environment variables."""

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from pydantic import BaseModel

from serve_app.autoscaling.params import BOUNDS
from serve_app.autoscaling.policy import ScalingParams
from serve_app.config import environment
from serve_app.config.models import AppConfig
from serve_app.gateway.auth import ApiKey
from tools.docs.markdown import code, named, prose, table
from tools.docs.reference.docstrings import attribute_docstrings
from tools.docs.reference.json_schema import value_of


def sections(
    model: type[BaseModel] = AppConfig, path: str = ""
) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield each model of the configuration with its path, parents first; the root has none."""
    yield path, model
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from sections(kind, f"{path}.{name}" if path else name)


def configuration() -> str:
    """Return a section for each model of the application's configuration."""
    parts = []
    for path, model in sections():
        rows = list(_rows(path, model))
        if rows:
            heading = [f"### {code(path)}"] if path else []
            parts += [*heading, prose(model.__doc__ or ""), _fields_table(rows)]
    return "\n\n".join(parts)


def api_keys() -> str:
    """Return a table of the fields of an API key's entry."""
    return _fields_table(_rows("", ApiKey))


def scaling_policy() -> str:
    """Return a table of the scaling parameters under ``policy_kwargs``."""
    meanings = attribute_docstrings(ScalingParams)
    kinds = {"int": "integer", "float": "number"}
    rows = [
        (
            code(field.name),
            f"{kinds[_name(field.type)]}; default {code(field.default)}",
            named(meanings[field.name]),
        )
        for field in fields(ScalingParams)
        if field.name not in BOUNDS
    ]
    return table(("Key", "Value", "Meaning"), rows)


def environment_variables() -> str:
    """Return a table of every environment variable that the package reads."""
    meanings = attribute_docstrings(environment)
    own = {
        value: meanings[name]
        for name, value in vars(environment).items()
        if name.endswith("_VARIABLE")
    }
    prefixes = ", ".join(code(f"{prefix}*") for prefix in environment.GENERATION_PREFIXES)
    rows = [
        *((code(name), meaning) for name, meaning in (own | environment.MACHINE_VARIABLES).items()),
        (prefixes, meanings["GENERATION_PREFIXES"]),
    ]
    return table(("Variable", "Meaning"), rows)


def _rows(path: str, model: type[BaseModel]) -> Iterator[tuple[str, str, str]]:
    schema = model.model_json_schema()
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        if "$ref" in field:  # a section of its own
            continue
        yield (
            code(f"{path}.{name}" if path else name),
            # The entries have no section of their own: the description names their keys.
            re.sub(
                r"list of \[\w+\]\(#\w+\)", "list of mappings", value_of(field, name in required)
            ),
            named(field["description"]),
        )


def _fields_table(rows: Any) -> str:
    return table(("Key", "Value", "Meaning"), rows)


def _name(kind: Any) -> str:
    return kind if isinstance(kind, str) else str(kind.__name__)
