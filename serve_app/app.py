"""The Serve application: the gateway in front of a generator for each model."""

from collections.abc import Mapping
from typing import Any, cast

from ray.serve import Application, Deployment
from ray.serve.config import RequestRouterConfig

from serve_app.autoscaling.params import read_scaling_params
from serve_app.config.deployment_names import GATEWAY
from serve_app.config.models import AppConfig, parse_app_config, parse_as
from serve_app.config.openai_app import OpenAIAppConfig
from serve_app.config.prechecks import check_some_model
from serve_app.config.serve_file import policy_kwargs
from serve_app.deadlines import graceful_shutdown_timeouts_s
from serve_app.deployments.gateway import Gateway
from serve_app.deployments.generator import Generator
from serve_app.deployments.router import GATEWAY_WITHIN_S, GatewayRouter
from serve_app.errors import ConfigError


def build(args: dict[str, Any]) -> Application:
    """Build the application. Serve calls it with ``args`` of the config file.

    Raises:
        ConfigError: for an unknown key, a wrong value, or if no model has a folder that can be
            served, before any replica is started.
    """
    return _application(parse_app_config(args), {})


def build_openai_app(args: OpenAIAppConfig | Mapping[str, Any]) -> Application:
    """Build the application for ``serve.run``, as `ray.serve.llm.build_openai_app` does for LLMs.

    Args:
        args: The keys of a config file's ``args``, with a list of ``models``. In addition each
            model may have a ``deployment_config``, and the gateway an
            ``ingress_deployment_config``.

    Raises:
        ConfigError: as `build`, or for an option that a deployment does not have.
    """
    config = parse_as(OpenAIAppConfig, args)
    return _application(config, config.deployment_options)


def _application(config: AppConfig, options: Mapping[str, Mapping[str, Any]]) -> Application:
    """Build the application with these options of its deployments, by their names."""
    check_some_model(config)
    graces_s = graceful_shutdown_timeouts_s(config)
    # A generator knows its own model only. Serve restarts all of them if anything in args changes.
    generators = [
        _deployment(Generator, name, graces_s[name], options.get(name, {})).bind(one)
        for name, one in zip(config.generators, config.each_model(), strict=True)
    ]
    hold_s = min(config.gateway.max_hold_s, GATEWAY_WITHIN_S)
    routing = RequestRouterConfig(
        request_router_class=GatewayRouter,  # type: ignore[arg-type]
        request_router_kwargs={"hold_s": hold_s},
    )
    gateway = _deployment(Gateway, GATEWAY, graces_s[GATEWAY], options.get(GATEWAY, {}))
    return gateway.options(request_router_config=routing).bind(config, *generators)


def _deployment(
    decorated: object, name: str, grace_s: float, options: Mapping[str, Any]
) -> Deployment:
    """Return the deployment with these options, and with the shutdown timeout if they set none.

    Raises:
        ConfigError: if Serve rejects an option, or the scaling policy a parameter.
    """
    # The decorator makes deployments of the classes, which type checkers do not see.
    deployment = cast(Deployment, decorated)
    try:
        if isinstance(scaling := options.get("autoscaling_config"), Mapping):
            read_scaling_params(policy_kwargs(scaling))
        return deployment.options(name=name, **{"graceful_shutdown_timeout_s": grace_s, **options})
    except (TypeError, ValueError, ConfigError) as error:
        raise ConfigError(f"the options of the deployment {name!r}: {error}") from None
