"""The metrics of one engine. Torch-free.

The engine's thread reports between steps, so every series is looked up only once. Values that can
be read from the engine are read at each scrape.
"""

import functools
import math
import socket
import weakref
from collections.abc import Callable
from typing import Literal, TypeVar, get_args

from serve_app import __version__
from serve_app.metrics.engine import (
    ARRIVING,
    BACKLOG,
    BATCH_SIZE,
    CANCELLATION,
    DEADLINES,
    DEVICE,
    DEVICE_MEMORY,
    ENGINE_INFO,
    ENGINE_REQUESTS,
    EXTRAPOLATED,
    FORECAST_ERROR,
    IMAGES,
    IMAGES_FLAGGED,
    LORA_BYTES,
    LORA_EVICTIONS,
    LORA_HITS,
    LORA_LOAD_SECONDS,
    LORA_LOADS,
    LORA_SWITCHES,
    LORAS_LOADED,
    OUT_OF_MEMORY,
    PIXELS,
    PREVIEWS,
    REJECTIONS,
    SHARING,
    SHARING_DIFFERENCE,
    SHARING_LIMITED,
    STALL,
    STEP,
    STEPS,
    STUCK,
    THROUGHPUT,
    UTILIZATION,
    LoraResult,
    Memory,
)
from serve_app.metrics.labels import size_label
from serve_app.protocol.load import ReplicaLoad
from serve_app.protocol.params import Sharing

T = TypeVar("T")

STALL_S = 0.1
"""Shortest pause that counts as a stall: requests are running, but no network is."""

RejectionReason = Literal["deadline", "backlog"]
"""Label of a rejection: its own or another deadline would be missed, or the queue is full."""

State = Literal["queued", "parked", "running"]
"""State of a request: it waits for a slot, waits for its next call, or is in that call."""


class EngineMetrics:
    """Counters and gauges of one engine. The counters exist from the start, at 0."""

    def __init__(self, model: str) -> None:
        self._model = model
        # Created per size on its first use, because each size has many series.
        self._steps = functools.cache(functools.partial(STEPS.labels, model))
        self._step = functools.cache(functools.partial(STEP.labels, model))
        self._images = functools.cache(functools.partial(IMAGES.labels, model))
        self._batch_size = BATCH_SIZE.labels(model)
        self._denoising = DEVICE.labels(model, "denoise")
        self._encoding = DEVICE.labels(model, "encode")
        self._decoding = DEVICE.labels(model, "decode")
        self._stall = STALL.labels(model)
        self._cancellation = CANCELLATION.labels(model)
        self._forecast_error = FORECAST_ERROR.labels(model)
        self._extrapolated = EXTRAPOLATED.labels(model)
        self._flagged = IMAGES_FLAGGED.labels(model)
        self._pixels = PIXELS.labels(model)
        self._previews = PREVIEWS.labels(model)
        self._lora_switches = LORA_SWITCHES.labels(model)
        self._lora_hits = LORA_HITS.labels(model)
        self._lora_loads = {
            result: LORA_LOADS.labels(model, result) for result in get_args(LoraResult)
        }
        self._lora_load_seconds = LORA_LOAD_SECONDS.labels(model)
        self._lora_evictions = LORA_EVICTIONS.labels(model)
        self._loras_loaded = LORAS_LOADED.labels(model)
        self._lora_bytes = LORA_BYTES.labels(model)
        self._out_of_memory = OUT_OF_MEMORY.labels(model)
        self._rejections = {
            reason: REJECTIONS.labels(model, reason) for reason in get_args(RejectionReason)
        }
        self._deadlines = {
            (kept, named): DEADLINES.labels(
                model, "met" if kept else "missed", "client" if named else "server"
            )
            for kept in (True, False)
            for named in (True, False)
        }

    # ---- once ----------------------------------------------------------------------------------

    def certified(self, sharing: Sharing, difference: float | None, limit: str) -> None:
        """Report how requests share the pipeline, and the limit to batches, if any."""
        SHARING.labels(self._model).state(sharing)
        if sharing == "batched":
            SHARING_LIMITED.labels(self._model).set(bool(limit))
        if difference is not None:
            SHARING_DIFFERENCE.labels(self._model).set(difference)

    def runs_on(self, device: str, gpu: str) -> None:
        """Report the device. ``gpu`` is its UUID, or empty."""
        ENGINE_INFO.labels(self._model, __version__, socket.gethostname(), device, gpu).info({})

    def watch(
        self,
        load: Callable[[], ReplicaLoad],
        count: Callable[[State], int],
        stuck: Callable[[], float],
        memory: Callable[[Memory], int] | None,
    ) -> None:
        """Read these methods of an engine at each scrape.

        They do not keep the engine alive. After its end the values are NaN.
        """
        for gauge, read in (
            (ARRIVING, lambda now: now.arrival_rate),
            (THROUGHPUT, lambda now: now.throughput),
            (UTILIZATION, lambda now: now.utilization),
        ):
            gauge.labels(self._model).set_function(_weakly(load, read))
        interactive = BACKLOG.labels(self._model, "interactive")
        interactive.set_function(_weakly(load, lambda now: now.backlog_s))
        batch = BACKLOG.labels(self._model, "batch")
        batch.set_function(_weakly(load, lambda now: now.batch_backlog_s))
        for state in get_args(State):
            requests = ENGINE_REQUESTS.labels(self._model, state)
            requests.set_function(_weakly(count, float, state))
        STUCK.labels(self._model).set_function(_weakly(stuck, float))
        if memory is not None:
            for kind in get_args(Memory):
                held = DEVICE_MEMORY.labels(self._model, kind)
                held.set_function(functools.partial(memory, kind))

    # ---- between steps -------------------------------------------------------------------------

    def called(self, size: tuple[int, int], batch_size: int, seconds: float) -> None:
        """Count a denoiser call of ``batch_size`` requests."""
        label = size_label(*size)
        self._step(label).observe(seconds)
        self._steps(label).inc(batch_size)
        self._batch_size.observe(batch_size)
        self._denoising.inc(seconds)

    def encoded(self, seconds: float) -> None:
        """Count a call of a text encoder, or another one before the first step."""
        self._encoding.inc(seconds)

    def decoded(self, seconds: float) -> None:
        """Count a call on the way from latents to pixels."""
        self._decoding.inc(seconds)

    def paused(self, seconds: float) -> None:
        """Report a pause between two calls of networks while requests were running."""
        if seconds > STALL_S:
            self._stall.observe(seconds)

    def rejected(self, reason: RejectionReason) -> None:
        self._rejections[reason].inc()

    def generated(self, size: tuple[int, int]) -> None:
        self._images(size_label(*size)).inc()
        self._pixels.inc(size[0] * size[1])

    def extrapolated(self, calls: int) -> None:
        """Count the denoiser calls of an image that were not made."""
        self._extrapolated.inc(calls)

    def flagged(self) -> None:
        """Count an image that the safety checker flagged."""
        self._flagged.inc()

    def due(self, kept: bool, named: bool) -> None:
        """Count an interactive image by whether it met its deadline, the client's if ``named``."""
        self._deadlines[kept, named].inc()

    def forecast_off(self, error: float) -> None:
        """Report the relative error of a predicted completion time."""
        self._forecast_error.observe(error)

    def cancelled(self, seconds: float) -> None:
        """Report the seconds from a cancellation until the request's slot is free."""
        self._cancellation.observe(seconds)

    def previewed(self) -> None:
        self._previews.inc()

    def switched_adapters(self) -> None:
        self._lora_switches.inc()

    def found_loras(self, count: int) -> None:
        """Count adapters on demand that a request found in memory."""
        self._lora_hits.inc(count)

    def loaded_lora(self, result: LoraResult, seconds: float) -> None:
        """Count the end of a load of an adapter on demand. Any thread may call it."""
        self._lora_loads[result].inc()
        self._lora_load_seconds.observe(seconds)

    def evicted_lora(self) -> None:
        self._lora_evictions.inc()

    def holds_loras(self, count: int, size_bytes: int) -> None:
        """Report the adapters on demand in memory."""
        self._loras_loaded.set(count)
        self._lora_bytes.set(size_bytes)

    def out_of_memory(self) -> None:
        self._out_of_memory.inc()


def _weakly(
    method: Callable[..., T], read: Callable[[T], float], *args: object
) -> Callable[[], float]:
    kept = weakref.WeakMethod(method)

    def value() -> float:
        alive = kept()
        return math.nan if alive is None else read(alive(*args))

    return value
