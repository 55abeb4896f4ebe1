"""The executor: runs the calls at which requests are parked, and measures them.

It merges denoiser calls of several requests into one, and repeats a failed call in smaller parts,
so that one request's error or a lack of memory does not fail the others. It decides nothing about
order; the scheduler does.
"""

import logging
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from serve_app.config.models import SpeedConfig
from serve_app.engine.batching.batch import BatchSpec, MergeableCall, prepare
from serve_app.engine.batching.rendezvous import Call, Rendezvous
from serve_app.engine.device import check_device, free_memory
from serve_app.engine.metrics import EngineMetrics
from serve_app.engine.model.finite import marked
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.model.speed import padded
from serve_app.engine.request import Request, link_batch_peers
from serve_app.engine.scheduling.cost import CostModel
from serve_app.engine.scheduling.load import LoadTracker
from serve_app.engine.timer import CallTimer
from serve_app.protocol.params import AdapterSet

logger = logging.getLogger(__name__)


class Executor:
    """Owns the rendezvous and the device's time. Used by the engine's thread only."""

    rendezvous: Rendezvous
    specs: Mapping[str, BatchSpec]
    """Rules to merge the calls of each site; empty before the certification, and if not batched."""
    denoiser_calls: int = 0
    """Denoiser calls since the start, failed ones included."""
    steps: int = 0
    """Requests in denoiser calls, summed over the calls that succeeded."""
    in_call: int = 0
    """Requests in the denoiser call that was begun last; 0 when idle."""

    def __init__(
        self,
        pipeline: LoadedPipeline,
        speed: SpeedConfig,
        cost: CostModel,
        load_tracker: LoadTracker,
        metrics: EngineMetrics,
    ) -> None:
        self.rendezvous = Rendezvous(pipeline.sites)
        self.specs = {}
        self._adapters = pipeline.adapters
        self._pad = speed.compile
        self._cost = cost
        self._load_tracker = load_tracker
        self._metrics = metrics
        self._timer = CallTimer(pipeline.device)
        self._last_call_at = math.inf  # end of the last call, or the arrival of work after a pause

    # ---- denoiser calls --------------------------------------------------------------------------

    def prepare(self, call: Call) -> MergeableCall | None:
        """Compare a parked denoiser call with others; ``None`` if it must run by itself."""
        try:
            return prepare(self.specs, call)
        except Exception:
            logger.exception("a call of %s cannot be merged with others: it runs alone", call.site)
            return None

    def denoise(self, batch: Sequence[Request]) -> list[Any]:
        """Run the denoiser calls of a batch together.

        Returns each request's share of the output, or the exception that its own call raised. A
        batch that fails is split: in halves if memory ran out, into single calls otherwise.

        Raises:
            torch.AcceleratorError: if the device can no longer be used.
        """
        size = 1  # of the parts to try next
        try:
            return self._forward(batch)
        except Exception as error:
            check_device(error)
            # The tensors of the failed call go first. A retry after running out of memory would
            # otherwise find as little memory as the call did.
            traceback.clear_frames(error.__traceback__)
            if len(batch) == 1:
                return [error]
            if isinstance(error, torch.OutOfMemoryError):
                self._metrics.out_of_memory()
                size = self._cost.lower_cap(batch[0].size, len(batch))
            failure = repr(error)
        free_memory()
        logger.warning(
            "a denoiser call for %d requests failed, trying %d at a time: %s",
            len(batch),
            size,
            failure,
        )
        parts = [batch[start : start + size] for start in range(0, len(batch), size)]
        return [outcome for part in parts for outcome in self.denoise(part)]

    def _forward(self, batch: Sequence[Request]) -> list[Any]:
        """Run one denoiser call, and return each request's share of its output.

        Infinity in it becomes NaN, because noise schedulers may clip it.
        """
        self.denoiser_calls += 1
        size, rows = batch[0].size, sum(request.rows for request in batch)
        solo_s = sum(self._cost.predict_call(size, request.rows) for request in batch)

        def took(seconds: float) -> None:
            self._load_tracker.called(solo_s, seconds)
            self._cost.observe_call(size, rows, len(batch), seconds)
            self._metrics.called(size, len(batch), seconds)

        self.in_call = len(batch)
        calls = [request.mergeable for request in batch if request.mergeable]
        adapters = batch[0].params.lora
        if calls:
            spec = self.specs[calls[0].call.site]
            filled = padded(calls) if self._pad else calls
            output = self._run(spec.merge(filled), adapters, took)
            outputs = spec.split(marked(output), filled)[: len(calls)]
        else:
            [request] = batch
            outputs = [marked(self._run(request.call, adapters, took))]
        self.steps += len(batch)
        link_batch_peers(batch)
        return outputs

    # ---- stages ----------------------------------------------------------------------------------

    def run_stage(self, request: Request) -> Any:
        """Run the parked call of an encoder or a VAE block, and return its output.

        Raises:
            Exception: what the module raises.
        """
        # Copies, not the call itself: its tensors must go as soon as the job goes on.
        site, size, encoding = request.call.site, request.size, not request.calls

        def took(seconds: float) -> None:
            self._cost.observe_stage(site, size, seconds)
            if encoding:
                request.encode_s += seconds
                self._metrics.encoded(seconds)
            else:
                request.non_denoiser_s += seconds
                self._metrics.decoded(seconds)

        return self._run(request.call, request.params.lora, took)

    # ---- all calls -------------------------------------------------------------------------------

    def _run(self, call: Call, adapters: AdapterSet, took: Callable[[float], None]) -> Any:
        """Run the module with these adapters; ``took`` gets the seconds once they are known."""
        if self._adapters.switch(adapters):
            self._metrics.switched_adapters()
        self._metrics.paused(time.perf_counter() - self._last_call_at)
        try:
            return self._timer.run(self.rendezvous.forward, call, took)
        finally:
            self._last_call_at = time.perf_counter()

    def when_timed(self, do: Callable[[], None]) -> None:
        """Call ``do`` once the time of the last call is known, which may be now."""
        self._timer.afterwards(do)

    def wait_idle(self) -> None:
        """Wait for the device to finish, as no request is left."""
        self._timer.wait()
        self.in_call = 0

    def work_arrived(self) -> None:
        """Count pauses between calls from now on, after an idle time."""
        self._last_call_at = time.perf_counter()

    def close(self) -> None:
        """Give the pipeline its own modules back."""
        self.rendezvous.close()
