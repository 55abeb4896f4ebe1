"""The GPU deployment: one replica owns one engine and speaks Ray for it."""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, replace

import psutil
import ray
import torch
from ray import serve

from serve_app.config import AppConfig
from serve_app.deployments.router import ShortestOfSeveral
from serve_app.engine.engine import Engine, EngineStats
from serve_app.errors import ConfigError
from serve_app.metrics import Report, report
from serve_app.protocol.events import (
    Completed,
    Event,
    Failed,
    GenerationResult,
    Preview,
    Progress,
    Queued,
    Timeline,
)
from serve_app.protocol.images import EncodedImage, Encoding, PartialImage
from serve_app.protocol.params import INITIAL, GenerationParams, ModelInfo, RequestContext
from serve_app.serve_log import log_through_serve

logger = logging.getLogger(__name__)

PLACE_EVERY_S = 0.5
"""How often a request that reports its progress says where it stands."""


def check_assigned_gpus(gpu_ids: list[str], device: str) -> None:
    """Raise `ConfigError` if Ray assigned a GPU to this process that torch cannot use.

    ``device`` is ``model.device``: who says "cpu" there does not ask for the GPU.
    """
    if gpu_ids and device == "cpu":
        logger.warning(
            "Ray assigned GPU %s, and model.device is 'cpu': it is not used", ", ".join(gpu_ids)
        )
        return
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


def _encode_preview(preview: Preview, params: GenerationParams, encoding: Encoding) -> bytes:
    """As large as the picture will be."""
    assert params.width is not None
    assert params.height is not None
    return encoding.encode(preview.image.resize((params.width, params.height)))


def _encode_result(
    result: GenerationResult, encoding: Encoding, timeline: Timeline | None
) -> EncodedImage:
    width, height = result.image.size  # waits for the device to be done with it
    rest_s = time.perf_counter() - result.ended_at
    return EncodedImage(
        encoding.encode(result.image),
        result.params.seed,
        width,
        height,
        result.warnings,
        result.prompt_tokens,
        result.queue_s,
        result.encode_s,
        result.denoise_s,
        result.decode_s + rest_s,
        timeline,
    )


# The engine's own queue orders the requests, so Serve may hand it many at once. A constructor
# that fails, fails again: no use in trying it twenty times, which is Serve's default.
@serve.deployment(
    ray_actor_options={"num_gpus": 1, "num_cpus": 1},
    max_ongoing_requests=256,
    max_queued_requests=1_024,
    max_constructor_retry_count=2,
    request_router_config={"request_router_class": ShortestOfSeveral},
)
class Generator:
    """Paints pictures. Methods run on the replica's event loop, the engine on its own thread."""

    def __init__(self, config: AppConfig) -> None:
        log_through_serve()
        self._replica = serve.get_replica_context().replica_id.unique_id
        gpu_ids = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        check_assigned_gpus(gpu_ids, config.model.device)
        # Imports for the most part; but Ray may have had it waiting for work before.
        age_s = time.time() - psutil.Process().create_time()
        logger.info("model %s: loading in a process that is %.1f s old", config.model.id, age_s)
        self._engine = Engine.load(config.model, config.engine)

    async def generate(
        self,
        params: GenerationParams,
        encoding: Encoding,
        progress: bool = False,
        context: RequestContext = INITIAL,
    ) -> AsyncIterator[Queued | Progress | PartialImage | Timeline | EncodedImage]:
        """Paint one picture.

        First comes `Queued`, then a `PartialImage` for each of ``params.preview_steps``, at last
        the picture. With ``progress`` also where the request stands: while it waits every
        `PLACE_EVERY_S`, then after its steps, those left out that come faster than they are sent.
        If it is traced, its `Timeline` comes with the picture, before a failure, and in between
        for who gives it up, `PLACE_EVERY_S` late: what is done by then costs no message.

        If the caller goes away, the engine drops the request before its next step.

        Raises:
            Overloaded: instead of the first event, if it is not taken in.
            DiffusionServeError: what the engine raised.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def on_event(event: Event) -> None:
            if progress or not isinstance(event, Progress):
                loop.call_soon_threadsafe(events.put_nowait, event)

        submitted_at = time.perf_counter()
        number = self._engine.submit(params, on_event, context)

        def told(timeline: Timeline) -> Timeline:
            return replace(timeline, age_s=time.perf_counter() - submitted_at)

        partial_images = itertools.count()
        end_at = located_at = loop.time()
        timeline: Timeline | None = None
        tell_at = math.inf
        ended = False
        try:
            while not ended:
                if progress and loop.time() - located_at > PLACE_EVERY_S:
                    located_at = loop.time()
                    self._engine.locate(number)
                if timeline is not None and loop.time() >= tell_at:
                    tell_at = math.inf
                    yield told(timeline)
                try:
                    event = await asyncio.wait_for(
                        events.get(), PLACE_EVERY_S if progress or tell_at < math.inf else None
                    )
                except TimeoutError:
                    continue
                match event:
                    case Queued():
                        end_at = loop.time() + event.eta_s
                        yield replace(event, replica=self._replica, number=number)
                    case Progress():
                        if event.eta_s is not None:
                            end_at = loop.time() + event.eta_s
                        if events.empty():  # or what comes next says more
                            yield replace(event, eta_s=max(0.0, end_at - loop.time()))
                    case Preview():
                        data = await asyncio.to_thread(_encode_preview, event, params, encoding)
                        yield PartialImage(next(partial_images), data)
                    case Timeline():
                        timeline = event
                        tell_at = loop.time() + PLACE_EVERY_S
                    case Completed(result):
                        ended = True
                        image = await asyncio.to_thread(_encode_result, result, encoding, timeline)
                        yield replace(image, age_s=time.perf_counter() - submitted_at)
                    case Failed(error):
                        ended = True
                        if timeline is not None:
                            yield told(timeline)
                        raise error
        finally:
            if not ended:
                self._engine.cancel(number)

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

    async def metrics(self) -> Report:
        """Its figures, for the gateway that was asked for those of all."""
        # Not on the loop, which hands on the events of all requests.
        return await asyncio.to_thread(report, "engine", self._replica)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The figures of `ReplicaLoad`, by name. Called by Serve, for the autoscaling policy."""
        return asdict(self._engine.demand())

    def check_health(self) -> None:
        """Called by Serve; raising makes it replace the replica."""
        self._engine.check()

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.close(drain=False)
