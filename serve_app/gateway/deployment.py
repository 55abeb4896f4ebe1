"""The gateway as a Ray Serve deployment, and the handle through which it reaches the generator."""

import asyncio
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from serve_app.config import AppConfig
from serve_app.engine.encoding import EncodedImage, ImageFormat
from serve_app.engine.params import GenerationParams, ModelInfo
from serve_app.errors import DiffusionServeError, Unavailable
from serve_app.gateway.routes import create_api

REPLICA_ATTEMPTS = 3
"""Replicas that one request may be sent to, one after the other, when they are lost."""


class HandlePainter:
    """A `Painter` behind a Serve handle."""

    def __init__(self, generator: DeploymentHandle[Any]) -> None:
        self._generator = generator

    async def paint(self, params: GenerationParams, image_format: ImageFormat) -> EncodedImage:
        for _ in range(REPLICA_ATTEMPTS):
            try:
                image: EncodedImage = await self._call("generate", params, image_format)
                return image
            except RayActorError:
                continue  # the replica is gone; the same seed paints the same picture elsewhere
        raise Unavailable("the replicas that painted this request were lost; try again.")

    async def describe(self, timeout_s: float) -> ModelInfo:
        try:
            info: ModelInfo = await asyncio.wait_for(self._call("describe"), timeout_s)
            return info
        except (TimeoutError, RayActorError):
            raise Unavailable("no replica is ready yet; try again in a few seconds.") from None

    async def _call(self, method: str, *args: Any) -> Any:
        response = getattr(self._generator, method).remote(*args)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError:
            raise Unavailable("too many requests are waiting; try again later.") from None
        except Exception as error:
            # Ray wraps what the replica raised; here it becomes itself again.
            cause = getattr(error, "cause", None)
            if isinstance(cause, DiffusionServeError):
                raise cause from None
            raise


@serve.deployment(
    ray_actor_options={"num_cpus": 0.5},
    max_ongoing_requests=1_000,
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
