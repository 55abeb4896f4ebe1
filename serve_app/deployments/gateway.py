"""The gateway as a Ray Serve deployment: the HTTP API in front of the generators' handles."""

import logging
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.config.environment import KEYS_VARIABLE, keys_in_environment
from serve_app.config.models import AppConfig
from serve_app.deployments.backend import ServeBackend
from serve_app.deployments.ray_compat import (
    CancelledAsDisconnect,
    address_beyond_loopback,
    handle_to,
)
from serve_app.deployments.replicas import Replicas
from serve_app.deployments.scrape import Scraper, WatchedModel
from serve_app.gateway.auth import KeyRing
from serve_app.gateway.routes import create_api
from serve_app.metrics.export import Report
from serve_app.serve_log import log_through_serve

if TYPE_CHECKING:
    from serve_app.gateway.tracing import Tracing

logger = logging.getLogger(__name__)

OPEN_TO_ALL = f"""
****************************************************************************************************
*  NO API KEY IS CONFIGURED, and this server listens on %s: every client may use it.
*  Make a key with `diffusion-serve key NAME` and name its file in gateway.keys_path, or set
*  {KEYS_VARIABLE}. Or set http_options.host to 127.0.0.1.
****************************************************************************************************
"""


# Far more requests than the generator accepts: a full gateway must still answer /health and reject
# the rest. Nodes with the label get no gateway, because they come and go: a gateway would keep an
# unused GPU node alive, or be lost with a spot node.
@serve.deployment(
    ray_actor_options={"num_cpus": 0.5, "label_selector": {"diffusion-serve/gateway": "!no"}},
    max_ongoing_requests=10_000,
)
@serve.ingress()
class Gateway:
    """Answers HTTP for the whole application."""

    def __init__(self, config: AppConfig, *generators: "DeploymentHandle[Any]") -> None:
        """Connect to the generators, one for each model in the order of the configuration."""
        log_through_serve()
        self._config = config
        context = serve.get_replica_context()
        watched = [
            WatchedModel(one.model.id, generator, Replicas.of(generator))
            for one, generator in zip(config.each_model(), generators, strict=True)
        ]
        self._backends = [
            ServeBackend(
                model.id,
                model.generator,
                config.gateway.max_hold_s,
                one.engine.limits.max_deadline_s,
                model.replicas,
            )
            for one, model in zip(config.each_model(), watched, strict=True)
        ]
        peers: DeploymentHandle[Any] = handle_to(context.deployment, context.app_name)
        name = context.replica_id.unique_id
        self._scraper = Scraper(name, peers, watched)
        self._keys = KeyRing(config.gateway.keys_file, keys_in_environment(), config.ids)
        if not self._keys and (host := address_beyond_loopback()):
            logger.warning(OPEN_TO_ALL, host)
        self._tracing = _tracing(config, name) if config.gateway.tracing else None

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the API inside the replica, where its parts exist. Serve calls it once."""
        traced = None if self._tracing is None else self._tracing.middleware
        api = create_api(self._config, self._backends, self._keys, self._scraper.gather, traced)
        api.add_middleware(CancelledAsDisconnect)
        return api

    async def metrics(self) -> Report:
        """Return this replica's metrics, for the gateway that answers a scrape."""
        return self._scraper.own()

    def __del__(self) -> None:
        """Send the last traces. Serve calls it when the last request has ended."""
        tracing = getattr(self, "_tracing", None)
        if tracing is not None:
            tracing.close()


def _tracing(config: AppConfig, replica: str) -> "Tracing":
    from serve_app.gateway.tracing import Tracing  # an optional dependency

    return Tracing.to_collector(config, replica)
