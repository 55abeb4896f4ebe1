"""The Serve application: the gateway in front of a generator for each model."""

from typing import Any, cast

from ray.serve import Application, Deployment
from ray.serve.config import RequestRouterConfig

from serve_app.config.deployment_names import GATEWAY
from serve_app.config.models import parse_app_config
from serve_app.config.prechecks import check_some_model
from serve_app.deadlines import graceful_shutdown_timeouts_s
from serve_app.deployments.gateway import Gateway
from serve_app.deployments.generator import Generator
from serve_app.deployments.router import GATEWAY_WITHIN_S, GatewayRouter


def build(args: dict[str, Any]) -> Application:
    """Build the application. Serve calls it with ``args`` of the config file.

    Raises:
        ConfigError: for an unknown key, a wrong value, or if no model has a folder that can be
            served, before any replica is started.
    """
    config = parse_app_config(args)
    check_some_model(config)
    graces_s = graceful_shutdown_timeouts_s(config)
    # The decorator makes deployments of the classes, which type checkers do not see.
    generator, gateway = cast(Deployment, Generator), cast(Deployment, Gateway)
    # A generator knows its own model only. Serve restarts all of them if anything in args changes.
    generators = [
        generator.options(name=name, graceful_shutdown_timeout_s=graces_s[name]).bind(one)
        for name, one in zip(config.generators, config.each_model(), strict=True)
    ]
    hold_s = min(config.gateway.max_hold_s, GATEWAY_WITHIN_S)
    routing = RequestRouterConfig(
        request_router_class=GatewayRouter,  # type: ignore[arg-type]
        request_router_kwargs={"hold_s": hold_s},
    )
    gateway = gateway.options(
        graceful_shutdown_timeout_s=graces_s[GATEWAY], request_router_config=routing
    )
    return gateway.bind(config, *generators)
