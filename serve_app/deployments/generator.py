"""The GPU deployment: one replica owns one engine and connects it to Ray."""

import asyncio
import itertools
import logging
import math
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, replace

import psutil
import ray
import torch
from ray import serve

from serve_app.config.models import AppConfig
from serve_app.deployments.process import (
    exit_when_lost,
    freeze_garbage_collector,
    keep_freed_memory,
    share_the_interpreter,
)
from serve_app.deployments.router import AdapterRouter
from serve_app.engine.engine import Engine
from serve_app.engine.model.loader import resolve_device
from serve_app.engine.stats import EngineStats
from serve_app.errors import ConfigError, NotFinite
from serve_app.metrics.export import Report, report
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
from serve_app.protocol.loras import LoraInfo, LoraList
from serve_app.protocol.params import INITIAL, GenerationParams, ModelInfo, RequestContext
from serve_app.serve_log import log_through_serve

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S = 0.5
"""Time between two progress events of a waiting request."""


def check_assigned_gpus(gpu_ids: list[str], device: str, deployment: str) -> None:
    """Raise `ConfigError` if Ray assigned a GPU to this process that torch cannot use.

    ``device`` is ``model.device``: with "cpu" the GPU is left unused. ``deployment`` is the name of
    the deployment that requested the GPU.
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
        f"To run without a GPU, set ray_actor_options.num_gpus of the deployment {deployment} to 0."
    )


def _encode_preview(preview: Preview, params: GenerationParams, encoding: Encoding) -> bytes:
    """Encode a preview, as large as the image."""
    return encoding.encode(preview.image_for(params))


def _encode_result(
    result: GenerationResult, encoding: Encoding, timeline: Timeline | None
) -> EncodedImage:
    width, height = result.image.size  # waits for the device
    copy_s, timings = time.perf_counter() - result.ended_at, result.timings
    return EncodedImage(
        encoding.encode(result.image),
        result.params.seed,
        width,
        height,
        result.warnings,
        result.prompt_tokens,
        timings._replace(decode_s=timings.decode_s + copy_s),
        timeline,
        safety=result.safety,
        calls=result.calls,
    )


# The engine's own queue orders the requests, so Serve may pass it many at once. A constructor that
# fails would fail again, so Serve's default of twenty attempts would only waste time.
@serve.deployment(
    ray_actor_options={"num_gpus": 1, "num_cpus": 1},
    max_ongoing_requests=256,
    max_queued_requests=1_024,
    max_constructor_retry_count=2,
    request_router_config={"request_router_class": AdapterRouter},
)
class Generator:
    """Generates images. Methods run on the replica's event loop, the engine on its own thread."""

    def __init__(self, config: AppConfig) -> None:
        log_through_serve()
        context = serve.get_replica_context()
        self._replica = context.replica_id.unique_id
        gpu_ids = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        check_assigned_gpus(gpu_ids, config.model.device, context.deployment)
        # Mostly imports, unless Ray started the process in advance.
        age_s = time.time() - psutil.Process().create_time()
        logger.info("model %s: loading in a process that is %.1f s old", config.model.id, age_s)
        if resolve_device(config.model.device).type == "cpu":
            keep_freed_memory()
        self._engine = Engine.load(config.model, config.engine, config.gateway.safety)
        freeze_garbage_collector()
        # Not a method: the thread must not keep this object alive.
        threading.Thread(target=exit_when_lost, args=(self._engine,), daemon=True).start()
        share_the_interpreter()

    async def generate(
        self,
        params: GenerationParams,
        encoding: Encoding,
        progress: bool = False,
        context: RequestContext = INITIAL,
    ) -> AsyncIterator[Queued | Progress | PartialImage | Timeline | EncodedImage]:
        """Generate one image.

        The first event is `Queued`. Then follow a `PartialImage` for each of
        ``params.preview_steps``, and the image. ``progress`` adds progress events: every
        `PROGRESS_EVERY_S` while the request waits, then after its steps. A progress event is left
        out if another event is already waiting to be sent.

        The `Timeline` of a traced request comes with the image, and before a failure. In between
        it comes `PROGRESS_EVERY_S` late, in case the caller goes away; so a request that is done
        by then costs no extra message.

        If the caller goes away, the engine cancels the request before its next step.

        Raises:
            Overloaded: in place of the first event, if the request is rejected.
            LoraNotFound: in place of the first event, if there is no adapter of a name.
            NotFinite: in place of the image, if the model's output is NaN or infinite.
            DiffusionServeError: if the engine raised it.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def on_event(event: Event) -> None:
            if progress or not isinstance(event, Progress):
                loop.call_soon_threadsafe(events.put_nowait, event)

        files = None
        if params.lora and (on_demand := self._engine.loras) is not None:
            # On a thread, because the source of the adapters may take its time.
            files = await loop.run_in_executor(on_demand.lookups, on_demand.find, params.lora)
        submitted_at = time.perf_counter()
        number = self._engine.submit(params, on_event, context, files)

        def aged(timeline: Timeline) -> Timeline:
            return replace(timeline, age_s=time.perf_counter() - submitted_at)

        partial_images = itertools.count()
        eta_at = located_at = loop.time()
        timeline: Timeline | None = None
        timeline_at = math.inf
        ended = False
        try:
            while not ended:
                if progress and loop.time() - located_at > PROGRESS_EVERY_S:
                    located_at = loop.time()
                    self._engine.locate(number)
                if timeline is not None and loop.time() >= timeline_at:
                    timeline_at = math.inf
                    yield aged(timeline)
                try:
                    event = await asyncio.wait_for(
                        events.get(),
                        PROGRESS_EVERY_S if progress or timeline_at < math.inf else None,
                    )
                except TimeoutError:
                    continue
                match event:
                    case Queued():
                        eta_at = loop.time() + event.eta_s
                        yield replace(event, replica=self._replica, number=number)
                    case Progress():
                        if event.eta_s is not None:
                            eta_at = loop.time() + event.eta_s
                        if events.empty():  # else the next event tells more
                            yield replace(event, eta_s=max(0.0, eta_at - loop.time()))
                    case Preview():
                        try:
                            data = await asyncio.to_thread(_encode_preview, event, params, encoding)
                        except NotFinite as error:  # the image shows whether the request fails
                            logger.warning("request %d: %s It is left out.", number, error)
                        else:
                            yield PartialImage(next(partial_images), data)
                    case Timeline():
                        timeline = event
                        timeline_at = loop.time() + PROGRESS_EVERY_S
                    case Completed(result):
                        ended = True
                        try:
                            image = await asyncio.to_thread(
                                _encode_result, result, encoding, timeline
                            )
                        except NotFinite:
                            if timeline is not None:
                                yield aged(timeline)
                            raise
                        yield replace(image, age_s=time.perf_counter() - submitted_at)
                    case Failed(error):
                        ended = True
                        if timeline is not None:
                            yield aged(timeline)
                        raise error
        finally:
            if not ended:
                self._engine.cancel(number)

    async def describe(self) -> ModelInfo:
        """Describe the loaded model. An answer means that the replica can generate now.

        Raises:
            Unavailable: if its engine has stopped.
        """
        self._engine.check()
        return self._engine.info

    async def loras(self) -> LoraList:
        """List the LoRA adapters that requests may name, and whether they are in memory here.

        Raises:
            LoraSourceAway: if the source of those on demand does not answer.
        """
        at_start = tuple(LoraInfo(name, True, False) for name in self._engine.info.loras)
        if (on_demand := self._engine.loras) is None:
            return LoraList(at_start)
        loop = asyncio.get_running_loop()
        return LoraList((*at_start, *await loop.run_in_executor(on_demand.listing, on_demand.list)))

    async def stats(self) -> EngineStats:
        """Return a snapshot of the engine, for debugging."""
        return self._engine.stats()

    async def metrics(self) -> Report:
        """Return this replica's metrics, for the gateway that answers a scrape."""
        # In a thread, because the loop passes on the events of all requests.
        return await asyncio.to_thread(report, "engine", self._replica)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the fields of `ReplicaLoad` by name. Serve calls it for the autoscaling policy."""
        return asdict(self._engine.replica_load())

    def check_health(self) -> None:
        """Raise if the engine has stopped or is stuck. Serve calls it, and replaces the replica."""
        self._engine.check()

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.close(drain=False)
