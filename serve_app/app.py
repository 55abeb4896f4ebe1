"""The Serve application: the gateway in front of the generator."""

from typing import Any, cast

from ray.serve import Application, Deployment
from ray.serve.config import RequestRouterConfig

from serve_app.config.model_files import check_model_folder
from serve_app.config.models import parse_app_config
from serve_app.config.safety import check_safety
from serve_app.deadlines import graceful_shutdown_timeouts_s
from serve_app.deployments.gateway import Gateway
from serve_app.deployments.generator import Generator
from serve_app.deployments.router import GATEWAY_WITHIN_S, GatewayRouter


def build(args: dict[str, Any]) -> Application:
    """Build the application. Serve calls it with ``args`` of the config file.

    Raises:
        ConfigError: for an unknown key, a wrong value, or a model folder that cannot be served,
            before any replica is started.
    """
    config = parse_app_config(args)
    check_model_folder(config.model)
    check_safety(config)
    graces_s = graceful_shutdown_timeouts_s(config)
    # The decorator makes deployments of the classes, which type checkers do not see.
    generator, gateway = (
        cast(Deployment, deployment).options(graceful_shutdown_timeout_s=graces_s[name])
        for name, deployment in (("Generator", Generator), ("Gateway", Gateway))
    )
    hold_s = min(config.gateway.max_hold_s, GATEWAY_WITHIN_S)
    routing = RequestRouterConfig(
        request_router_class=GatewayRouter,  # type: ignore[arg-type]
        request_router_kwargs={"hold_s": hold_s},
    )
    gateway = gateway.options(request_router_config=routing)
    return gateway.bind(config, generator.bind(config))
