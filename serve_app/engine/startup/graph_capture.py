"""The capture of CUDA graphs at start-up: for the batches that gain, and only if they are right."""

import functools
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from serve_app.engine.batching.batch import BatchSpec, prepare
from serve_app.engine.batching.rendezvous import Call, Job, Rendezvous
from serve_app.engine.device import free_memory, memory_reader, release
from serve_app.engine.model.graphs import Graphs
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.model.sample_requests import sample
from serve_app.engine.model.speed import bucket
from serve_app.engine.scheduling.cost import Size
from serve_app.engine.startup.comparison import relative_l2
from serve_app.engine.startup.merging import rounding
from serve_app.engine.startup.runs import calls_of
from serve_app.engine.timer import median_seconds, wait_for_device

logger = logging.getLogger(__name__)

WORTHWHILE = 0.95
"""Largest time of a replay, as a share of the time of the call, at which a graph is kept."""

REPEATS = 5
"""Measured repetitions of a call, and of its replay."""


class GraphCapture:
    """Captures the denoiser calls of a pipeline. Used on the thread that owns it."""

    def __init__(
        self,
        pipeline: LoadedPipeline,
        graphs: Graphs,
        rendezvous: Rendezvous,
        specs: Mapping[str, BatchSpec],
        padded: bool = False,
    ) -> None:
        """``padded`` says that the engine pads batches and prompts, as for compiled networks."""
        self._pipeline = pipeline
        self._graphs = graphs
        self._rendezvous = rendezvous
        self._specs = specs
        self._padded = padded
        self._tolerance = rounding(pipeline.dtype, pipeline.device)
        self._unchecked: set[Hashable] = set()
        """Keys of graphs that have repeated no other call yet."""
        self._counts: dict[Hashable, Sequence[int]] = {}
        """Numbers of requests to capture, by the kind of call, where an attempt failed."""

    def capture(self, size: Size, most: int) -> None:
        """Capture the calls for images of ``size``, with and without guidance.

        Batches of up to ``most`` requests are captured, up to the first one that does not gain:
        larger calls keep the GPU busy for longer than their launches take. A graph is kept if it
        gives the outputs of its own call and of one in a later step.
        """
        counts = [
            count for count in range(1, most + 1) if not self._padded or count == bucket(count)
        ]
        read = memory_reader(self._pipeline.device)
        before, known = 0 if read is None else read("reserved"), len(self._graphs)
        for guidance_scale in (5.0, 1.0):
            params = replace(sample(self._pipeline, size), guidance_scale=guidance_scale)
            job = Job(functools.partial(self._pipeline.generate, params))
            with calls_of(self._pipeline, job) as calls:
                for call in calls:
                    if call.site in self._pipeline.denoisers:
                        self._capture_batches(call, counts)
                    job.resume(self._rendezvous.forward(call))
        if self._unchecked:
            logger.warning("%d CUDA graphs fit no later step, and go", len(self._unchecked))
        for key in self._unchecked:
            self._graphs.discard(key)
        self._unchecked.clear()
        free_memory()
        held = 0 if read is None else read("reserved") - before
        logger.info(
            "%d CUDA graphs for images of %dx%d, in %.0f MiB",
            len(self._graphs) - known,
            *size,
            held / 2**20,
        )

    def _capture_batches(self, call: Call, counts: Sequence[int]) -> None:
        """Capture or check the graphs of a call, merged with itself to each of ``counts``."""
        single = prepare(self._specs, call)
        kind = call.site if single is None else (single.key, single.length)
        counts = self._counts.get(kind, counts if single else (1,))
        for index, count in enumerate(counts):
            merged = call
            if single is not None:
                spec = self._specs[call.site]
                length = spec.bucket([single]) if self._padded else None
                merged = spec.merge([single] * count, length)
            try:
                gains = self._capture(functools.partial(self._rendezvous.forward, merged))
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                release(error)
                free_memory()
                wait_for_device()  # raises if the failed capture left the GPU unusable
                logger.warning(
                    "%s has no CUDA graphs for %d requests and more: %s", call.site, count, reason
                )
                gains = False
            if not gains:
                self._counts[kind] = counts[:index]
                return

    def _capture(self, run: Callable[[], Any]) -> bool:
        """Capture a call, or compare it with its graph. Return False if a graph does not gain.

        Raises:
            ValueError: the graph has another output than the call. The graph is dropped.
            Exception: the call cannot be captured.
        """
        with self._graphs.mode("off"):
            expected = run()
        known = len(self._graphs)
        with self._graphs.mode("capture"):
            replayed = run()
        key, is_new = self._graphs.replayed, len(self._graphs) > known
        gains = True
        if not (same := relative_l2(expected, replayed) <= self._tolerance):  # NaN is not
            gains = False
        elif is_new:
            with self._graphs.mode("off"):
                call_s = median_seconds(run, REPEATS)
            gains = median_seconds(run, REPEATS) <= WORTHWHILE * call_s
        self._unchecked.discard(key)
        if not gains:
            self._graphs.discard(key)
        elif is_new:
            self._unchecked.add(key)
        if not same:
            raise ValueError("the output depends on more than the inputs of the call")
        return gains
