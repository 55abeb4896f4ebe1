"""The Serve application: the gateway in front of the generator."""

from typing import Any, cast

from ray.serve import Application, Deployment

from serve_app.config import check_model_folder, parse_app_config
from serve_app.deployments.gateway import Gateway
from serve_app.deployments.generator import Generator

GRACE_S = 10.0
"""Between the longest that a request may take and the end of a replica that is to go away."""


def build(args: dict[str, Any]) -> Application:
    """Called by Serve with ``args`` of the config file.

    Raises:
        ConfigError: for an unknown key, a wrong value, or a model folder that cannot be served,
            before any replica is started.
    """
    config = parse_app_config(args)
    check_model_folder(config.model)
    paint_s = config.engine.limits.max_deadline_s
    hold_s = config.gateway.max_hold_s
    # The decorator makes deployments of the classes, which type checkers do not see.
    generator, gateway = (
        cast(Deployment, deployment).options(graceful_shutdown_timeout_s=longest_s + GRACE_S)
        for deployment, longest_s in ((Generator, paint_s), (Gateway, hold_s + paint_s))
    )
    return gateway.bind(config, generator.bind(config))
