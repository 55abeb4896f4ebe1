"""The gateway as a Ray Serve deployment, and the handle through which it reaches the generator."""

import asyncio
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve_app.config import AppConfig
from serve_app.engine.encoding import EncodedImage, ImageFormat
from serve_app.engine.params import GenerationParams, ModelInfo
from serve_app.errors import DiffusionServeError, Unavailable
from serve_app.gateway.routes import create_api

REPLICA_ATTEMPTS = 3
"""Replicas that one request may be sent to, one after the other, when they are lost."""

HEALTH_TIMEOUT_S = 2.0
START_TIMEOUT_S = 30.0
"""How long a request waits for the first replica to become ready."""


class HandlePainter:
    """A `Painter` behind a Serve handle."""

    def __init__(self, generator: DeploymentHandle[Any]) -> None:
        self._generator = generator
        self._info: ModelInfo | None = None

    async def paint(self, params: GenerationParams, image_format: ImageFormat) -> EncodedImage:
        refusal = Unavailable("the replicas that painted this request were lost; try again.")
        # The same seed paints the same picture on another replica.
        for _ in range(REPLICA_ATTEMPTS):
            try:
                image: EncodedImage = await self._call("generate", params, image_format)
                return image
            except (RayActorError, ObjectLostError):
                continue  # it died, or its node did, with the picture
            except Unavailable as error:
                refusal = error  # it is going away; another may not
        raise refusal

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

    async def _call(self, method: str, *args: Any) -> Any:
        response = getattr(self._generator, method).remote(*args)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError:
            raise Unavailable("too many requests are waiting; try again later.") from None
        except DeploymentUnavailableError:
            raise Unavailable("the model could not be started; see the server's log.") from None
        except RayTaskError as error:
            # Ray wraps what the replica raised; here it becomes itself again.
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
        self._config = config
        self._painter = HandlePainter(generator)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self._config, self._painter)
