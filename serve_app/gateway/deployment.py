"""The gateway as a Ray Serve deployment, and the handle through which it reaches the generator."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from ipaddress import ip_address
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve_app.config import KEYS_VARIABLE, AppConfig, keys_in_environment
from serve_app.engine.encoding import Encoding, PartialImage
from serve_app.engine.params import GenerationParams, ModelInfo
from serve_app.errors import DiffusionServeError, Overloaded, Unavailable
from serve_app.gateway.auth import KeyRing
from serve_app.gateway.painter import PainterEvent
from serve_app.gateway.routes import create_api
from serve_app.serve_log import log_through_serve

logger = logging.getLogger(__name__)

REPLICA_ATTEMPTS = 3
"""Replicas that one request may be sent to, one after the other, when they are lost."""

HEALTH_TIMEOUT_S = 2.0
START_TIMEOUT_S = 30.0
"""How long a request waits for the first replica to become ready."""

OPEN_TO_ALL = f"""
****************************************************************************************************
*  NO API KEY IS CONFIGURED, and this server listens on %s: whoever reaches it may use the GPU.
*  Make a key with `diffusion-serve key NAME` and name its file in gateway.keys_path, or set
*  {KEYS_VARIABLE}. Or set http_options.host to 127.0.0.1.
****************************************************************************************************
"""


class HandlePainter:
    """A `Painter` behind a Serve handle."""

    def __init__(self, generator: DeploymentHandle[Any]) -> None:
        self._generator = generator
        self._info: ModelInfo | None = None

    async def paint(
        self, params: GenerationParams, encoding: Encoding, progress: bool = False
    ) -> AsyncGenerator[PainterEvent, None]:
        refusal = Unavailable("the replicas that painted this request were lost; try again.")
        partial_images = 0  # sent so far
        # The same seed paints the same picture on another replica, and the same previews.
        for _ in range(REPLICA_ATTEMPTS):
            try:
                async with aclosing(self._events(params, encoding, progress)) as events:
                    async for event in events:
                        if isinstance(event, PartialImage):
                            if event.index < partial_images:
                                continue
                            partial_images += 1
                        yield event
                return
            except (RayActorError, ObjectLostError):
                continue  # it died, or its node did, with the picture
            except Unavailable as error:
                refusal = error  # it is going away; another may not
        raise refusal

    async def _events(
        self, params: GenerationParams, encoding: Encoding, progress: bool
    ) -> AsyncGenerator[PainterEvent, None]:
        generate: Any = self._generator.options(stream=True).generate
        events = generate.remote(params, encoding, progress)
        ended = False
        try:
            with _as_raised():
                async for event in events:
                    yield event
            ended = True
        finally:
            if not ended:
                events.cancel()

    async def describe(self) -> ModelInfo:
        # Asked for once: all replicas of an application run the same model.
        if self._info is None:
            self._info = await self._describe(START_TIMEOUT_S)
        return self._info

    async def check_ready(self) -> None:
        await self._describe(HEALTH_TIMEOUT_S)

    async def _describe(self, timeout_s: float) -> ModelInfo:
        try:
            info: ModelInfo = await asyncio.wait_for(self._call("describe"), timeout_s)
            return info
        except (TimeoutError, RayActorError):
            raise Unavailable("no replica is ready; try again in a few seconds.") from None

    async def _call(self, method: str) -> Any:
        response = getattr(self._generator, method).remote()
        try:
            with _as_raised():
                return await response
        except asyncio.CancelledError:
            response.cancel()
            raise


@contextmanager
def _as_raised() -> Iterator[None]:
    """Turn Ray's errors into ours, and what the replica raised, which Ray wraps, into itself."""
    try:
        yield
    except BackPressureError:
        raise Overloaded("too many requests are waiting; try again later.") from None
    except DeploymentUnavailableError:
        raise Unavailable("the model could not be started; see the server's log.") from None
    except RayTaskError as error:
        if isinstance(error.cause, DiffusionServeError):
            raise error.cause from None
        raise


# Far more than the generator takes: one that is full must still answer /health and refuse the rest.
@serve.deployment(
    ray_actor_options={"num_cpus": 0.5},
    max_ongoing_requests=10_000,
    graceful_shutdown_timeout_s=120,
)
@serve.ingress()
class Gateway:
    """Answers HTTP for the whole application."""

    def __init__(self, config: AppConfig, generator: "DeploymentHandle[Any]") -> None:
        log_through_serve()
        self._config = config
        self._painter = HandlePainter(generator)
        self._keys = KeyRing(config.gateway.keys_file, keys_in_environment())
        if not self._keys and (host := _listens_beyond_loopback()):
            logger.warning(OPEN_TO_ALL, host)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self._config, self._painter, self._keys)


def _listens_beyond_loopback() -> str | None:
    """The address at which Serve's proxies listen, if others than this machine reach it."""
    client: Any = _get_global_client()
    host: str = client.http_config.host or ""
    try:
        local = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        local = False  # a name
    return None if local else host or "every address"
