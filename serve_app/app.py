"""The Serve application: the gateway in front of the generator."""

from typing import Any, cast

from ray.serve import Application, Deployment

from serve_app.config import check_model_folder, parse_app_config
from serve_app.deployments.gateway import Gateway
from serve_app.deployments.generator import Generator

GRACE_S = 10.0
"""Seconds that a stopping replica gets beyond the longest duration of a request."""


def build(args: dict[str, Any]) -> Application:
    """Build the application. Serve calls it with ``args`` of the config file.

    Raises:
        ConfigError: for an unknown key, a wrong value, or a model folder that cannot be served,
            before any replica is started.
    """
    config = parse_app_config(args)
    check_model_folder(config.model)
    generation_s = config.engine.limits.max_deadline_s
    hold_s = config.gateway.max_hold_s
    # The decorator makes deployments of the classes, which type checkers do not see.
    generator, gateway = (
        cast(Deployment, deployment).options(graceful_shutdown_timeout_s=longest_s + GRACE_S)
        for deployment, longest_s in ((Generator, generation_s), (Gateway, hold_s + generation_s))
    )
    return gateway.bind(config, generator.bind(config))
