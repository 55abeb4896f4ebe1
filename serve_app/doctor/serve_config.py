"""The Serve config inside a RayService, before anything has checked it."""

from collections.abc import Mapping
from typing import Any

import yaml

from serve_app.config.serve_file import IMPORT_PATH
from serve_app.doctor.kube import Object
from serve_app.doctor.operator_rules.rule import mapping, mappings
from serve_app.errors import ConfigError

FIELD = "spec.serveConfigV2"


def applications(service: Object) -> list[Mapping[str, Any]]:
    """Return the applications of this project. Raises `ConfigError` if there is none."""
    text = mapping(service.get("spec")).get("serveConfigV2") or ""
    try:
        content = mapping(yaml.safe_load(str(text)))
    except yaml.YAMLError as error:
        raise ConfigError(f"{FIELD} is not YAML: {error}") from None
    ours = [
        one
        for one in mappings(content.get("applications"))
        if one.get("import_path") == IMPORT_PATH
    ]
    if not ours:
        raise ConfigError(
            f"{FIELD} has no application with import_path {IMPORT_PATH!r}: copy one of configs/ "
            "into it by `replacements`."
        )
    return ours


def deployments(application: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return what the config sets for each deployment that it names."""
    return {str(one.get("name")): one for one in mappings(application.get("deployments"))}
