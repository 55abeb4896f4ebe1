"""The GPU deployment: one replica owns one engine and speaks Ray for it."""

import asyncio
import logging

import ray
import torch
from ray import serve

from serve_app.config import AppConfig
from serve_app.engine.encoding import EncodedImage, ImageFormat, encode
from serve_app.engine.engine import Engine, EngineStats
from serve_app.engine.events import Completed, Event, Failed
from serve_app.engine.params import GenerationParams, ModelInfo
from serve_app.errors import ConfigError

logger = logging.getLogger(__name__)


def check_assigned_gpus(gpu_ids: list[str]) -> None:
    """Raise `ConfigError` if Ray assigned a GPU to this process that torch cannot use."""
    if not gpu_ids or torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        advice = (
            f"torch {torch.__version__} is a build without CUDA: install a CUDA build of the same "
            "version."
        )
    else:
        advice = (
            f"torch {torch.__version__} needs CUDA {torch.version.cuda}: check that nvidia-smi "
            "works here, that the driver is new enough, and that the container has GPUs."
        )
    raise ConfigError(
        f"Ray assigned GPU {', '.join(gpu_ids)} to this replica, but torch cannot use it. {advice} "
        "To run without a GPU, set ray_actor_options.num_gpus of the deployment Generator to 0."
    )


# The engine's own queue orders the requests, so Serve may hand it many at once. A constructor
# that fails, fails again: no use in trying it twenty times, which is Serve's default.
@serve.deployment(
    ray_actor_options={"num_gpus": 1, "num_cpus": 1},
    max_ongoing_requests=256,
    max_queued_requests=1_024,
    max_constructor_retry_count=2,
    graceful_shutdown_timeout_s=120,
)
class Generator:
    """Paints pictures. Methods run on the replica's event loop, the engine on its own thread."""

    def __init__(self, config: AppConfig) -> None:
        check_assigned_gpus(ray.get_runtime_context().get_accelerator_ids().get("GPU", []))
        self._engine = Engine.load(config.model, config.engine)

    async def generate(self, params: GenerationParams, image_format: ImageFormat) -> EncodedImage:
        """Paint one picture.

        If the caller goes away, the engine drops the request before its next step.

        Raises:
            DiffusionServeError: what the engine raised.
        """
        loop = asyncio.get_running_loop()
        last: asyncio.Future[Completed | Failed] = loop.create_future()

        def finish(event: Completed | Failed) -> None:
            if not last.done():
                last.set_result(event)

        def on_event(event: Event) -> None:
            if isinstance(event, Completed | Failed):
                loop.call_soon_threadsafe(finish, event)

        number = self._engine.submit(params, on_event)
        try:
            event = await last
        except asyncio.CancelledError:
            self._engine.cancel(number)
            raise
        if isinstance(event, Failed):
            raise event.error
        result = event.result
        data = await asyncio.to_thread(lambda: encode(result.image, image_format))
        width, height = result.image.size
        return EncodedImage(data, params.seed, width, height, result.warnings)

    async def describe(self) -> ModelInfo:
        """What the loaded model can do; answering it means that the replica can paint now.

        Raises:
            Unavailable: if its engine has stopped.
        """
        self._engine.check()
        return self._engine.info

    async def stats(self) -> EngineStats:
        """A snapshot of the engine, for people who look into a replica."""
        return self._engine.stats()

    def check_health(self) -> None:
        """Called by Serve; raising makes it replace the replica."""
        self._engine.check()

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.close(drain=False)
