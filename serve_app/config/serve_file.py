"""A Serve config file (YAML): the applications of this project in it, and their scaling.

Serve reads the file itself. This module reads the parts that `diffusion-serve check`, `plan`,
`doctor` and `serve` need, and knows no Ray.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from serve_app.config.deployment_names import GATEWAY
from serve_app.config.models import AppConfig, parse_app_config
from serve_app.errors import ConfigError

IMPORT_PATH = "serve_app.app:build"
"""The import path by which a Serve config names this application."""

WORK_POLICY = "serve_app.autoscaling.ray_policy:WorkPolicy"
"""The import path by which a Serve config names the policy that scales replicas by work."""

SERVE_DELAYS_S = {"upscale_delay_s": 30.0, "downscale_delay_s": 600.0}
"""Serve's defaults: seconds that Serve waits before it applies a policy's decision."""


def read_serve_config(path: Path) -> list[AppConfig]:
    """Return the configuration of each application of this project in a Serve config file.

    Raises:
        ConfigError: if the file cannot be read, or an application's ``args`` are wrong.
    """
    return [parse_app_config(one.get("args", {})) for one in read_applications(path)]


@dataclass(frozen=True)
class GeneratorSettings:
    """A model of a Serve config file, and what the file sets for its deployment."""

    config: AppConfig
    """The application's configuration with this model alone."""
    deployment: str
    """Name of the deployment."""
    autoscaling: Mapping[str, Any]
    """``autoscaling_config``. A fixed ``num_replicas`` becomes equal bounds. Empty without both."""
    num_gpus: float | None
    """GPUs that a replica requests; None where not set."""


def read_generators(path: Path) -> list[GeneratorSettings]:
    """Return the models of all applications of this project, each with its deployment's settings.

    Raises:
        ConfigError: if the file cannot be read, or an application's ``args`` or deployments are
            wrong.
    """
    found = []
    for application in read_applications(path):
        config = parse_app_config(application.get("args", {}))
        given = _deployments(path, application, (*config.generators, GATEWAY))
        for one, name in zip(config.each_model(), config.generators, strict=True):
            own = given.get(name, {})
            found.append(
                GeneratorSettings(one, name, _autoscaling(path, own), _num_gpus(path, own))
            )
    return found


def choose_generator(path: Path, model: str | None) -> GeneratorSettings:
    """Return the settings of the model with this id; of the first one without an id.

    Raises:
        ConfigError: as `read_generators`, or if the file has no such model.
    """
    generators = read_generators(path)
    if model is None:
        return generators[0]
    for one in generators:
        if one.config.model.id == model:
            return one
    known = ", ".join(repr(one.config.model.id) for one in generators)
    raise ConfigError(f"{path} has no model {model!r}; it has {known}.")


def policy_kwargs(autoscaling: Mapping[str, Any]) -> dict[str, object]:
    """Return the parameters of `WORK_POLICY`; nothing if another policy is named.

    Raises:
        ConfigError: if ``policy_kwargs`` are no mapping, or if Serve would wait before it applies
            the policy's decision.
    """
    policy = autoscaling.get("policy") or {}
    if policy.get("policy_function") != WORK_POLICY:
        return {}
    for name, default_s in SERVE_DELAYS_S.items():
        if autoscaling.get(name, default_s) == 0:
            continue
        origin = "" if name in autoscaling else ", Serve's default where it is not set"
        raise ConfigError(
            f"autoscaling_config.{name} is {autoscaling.get(name, default_s)}{origin}: Serve waits "
            "this many seconds before it applies a decision of the policy, which has its own "
            "delays. Set it to 0."
        )
    given = policy.get("policy_kwargs") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"policy_kwargs must be a mapping; it is {given!r}.")
    return given


def foreign_policy(autoscaling: Mapping[str, Any]) -> str | None:
    """Return the policy that is named instead of `WORK_POLICY`; None if there is no other."""
    named = (autoscaling.get("policy") or {}).get("policy_function")
    return None if named in (None, WORK_POLICY) else str(named)


def read_serve_file(path: Path) -> dict[str, Any]:
    """Return the content of a Serve config file with at least one application of this project.

    Raises:
        ConfigError: if the file cannot be read, is not YAML, or has no such application.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not (isinstance(content, dict) and _of_this_project(content)):
        raise ConfigError(
            f"{path} has no application with import_path {IMPORT_PATH!r}; see configs/ for "
            "examples."
        )
    return content


def read_applications(path: Path) -> list[dict[str, Any]]:
    """Return the applications of this project as the file has them.

    Raises:
        ConfigError: as `read_serve_file`.
    """
    return _of_this_project(read_serve_file(path))


def _of_this_project(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    applications = content.get("applications")
    return [
        application
        for application in (applications if isinstance(applications, list) else [])
        if isinstance(application, dict) and application.get("import_path") == IMPORT_PATH
    ]


def _deployments(
    path: Path, application: Mapping[str, Any], known: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return the settings of deployments by name."""
    deployments = application.get("deployments") or []
    if not isinstance(deployments, list) or not all(isinstance(d, dict) for d in deployments):
        raise ConfigError(f"{path}: deployments must be a list of mappings.")
    for one in deployments:
        if one.get("name") not in known:
            raise ConfigError(
                f"{path}: deployments has the name {one.get('name')!r}; the application has "
                f"{', '.join(map(repr, known))}."
            )
    return {one["name"]: one for one in deployments}


def _autoscaling(path: Path, deployment: Mapping[str, Any]) -> dict[str, Any]:
    scaling = deployment.get("autoscaling_config") or {}
    if not isinstance(scaling, dict) or not isinstance(scaling.get("policy") or {}, dict):
        raise ConfigError(f"{path}: autoscaling_config and its policy must be mappings.")
    if not scaling and "num_replicas" in deployment:
        return dict.fromkeys(("min_replicas", "max_replicas"), deployment["num_replicas"])
    return scaling


def _num_gpus(path: Path, deployment: Mapping[str, Any]) -> float | None:
    options = deployment.get("ray_actor_options") or {}
    number: Any = options.get("num_gpus") if isinstance(options, dict) else options
    if not (number is None or (isinstance(number, int | float) and number >= 0)):
        raise ConfigError(
            f"{path}: ray_actor_options.num_gpus must be a number of GPUs; it is {number!r}."
        )
    return number
