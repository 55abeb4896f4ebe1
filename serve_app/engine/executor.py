"""The executor: runs the calls at which requests are parked, and measures them.

It merges denoiser calls of several requests into one, and repeats a failed call in smaller parts,
so that one request's error or a lack of memory does not fail the others. It decides nothing about
order; the scheduler does.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from serve_app.config.speed import SpeedConfig
from serve_app.engine.batching.batch import BatchSpec, MergeableCall, prepare
from serve_app.engine.batching.rendezvous import Call, Rendezvous
from serve_app.engine.device import check_device, clear_frames, free_memory, is_out_of_memory
from serve_app.engine.metrics import EngineMetrics
from serve_app.engine.model.finite import marked
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.model.speed import padded
from serve_app.engine.request import Request, link_batch_peers
from serve_app.engine.scheduling.cost import CostModel
from serve_app.engine.scheduling.load import LoadTracker
from serve_app.engine.timer import CallTimer, Took
from serve_app.engine.watchdog import Task, Watchdog
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
        watchdog: Watchdog,
    ) -> None:
        self.rendezvous = Rendezvous(pipeline.sites)
        self._pipeline = pipeline
        self.specs = {}
        self._pad = speed.compile
        self._cost = cost
        self._load_tracker = load_tracker
        self._metrics = metrics
        self._watchdog = watchdog
        self._timer = CallTimer(pipeline.device, paused=metrics.paused)

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
            clear_frames(error)
            if len(batch) == 1:
                return [error]
            if is_out_of_memory(error):
                self._metrics.out_of_memory()
                size = self._cost.lower_cap(batch[0].work, len(batch))
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
        size, work = batch[0].size, batch[0].work
        rows = sum(request.rows for request in batch)
        solo_s = sum(request.entry.step_s for request in batch)

        def took(seconds: float, ended_at: float) -> None:
            self._load_tracker.called(solo_s, seconds)
            self._cost.observe_call(work, rows, len(batch), seconds)
            self._metrics.called(size, len(batch), seconds)
            for request in batch:
                request.denoised_at = ended_at

        self.in_call = len(batch)
        calls = [request.mergeable for request in batch if request.mergeable]
        adapters = batch[0].params.lora
        site, kind = batch[0].call.site, (calls[0].key, adapters, rows) if calls else None
        self._watchdog.begin(
            Task(site, size, len(batch), self._cost.predict_call(work, rows), kind)
        )
        if calls:
            spec = self.specs[calls[0].call.site]
            filled = padded(calls) if self._pad else calls
            length = spec.bucket(filled) if self._pad else None
            output = self._run(spec.merge(filled, length), adapters, took)
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
        site, work, encoding = request.call.site, request.work, not request.calls

        def took(seconds: float, _: float) -> None:
            self._cost.observe_stage(site, work, seconds)
            if encoding:
                request.encode_s += seconds
                self._metrics.encoded(seconds)
            else:
                request.non_denoiser_s += seconds
                self._metrics.decoded(seconds)

        predicted_s = self._cost.predict_stage(site, work)
        self._watchdog.begin(Task(site, request.size, 1, predicted_s, (site, work)))
        return self._run(request.call, request.params.lora, took)

    # ---- all calls -------------------------------------------------------------------------------

    def _run(self, call: Call, adapters: AdapterSet, took: Took) -> Any:
        """Run the module with these adapters; ``took`` gets its time once that is known."""
        if self._pipeline.adapters.switch(adapters):
            self._metrics.switched_adapters()
        return self._timer.run(self.rendezvous.forward, call, took)

    def resumed(self, took: Took) -> None:
        """Measure what a job did since the last call or the last job, on the device's clock."""
        self._timer.lap(took)

    def when_done(self, do: Callable[[float], None]) -> None:
        """Pass the time at which the device has done everything so far, once it is known."""
        self._timer.when_done(do)

    def wait_idle(self) -> None:
        """Wait for the device to finish, as no request is left."""
        self._timer.wait()
        self._watchdog.begin(None)
        self.in_call = 0

    def work_arrived(self) -> None:
        """Count pauses between calls from now on, after an idle time."""
        self._watchdog.begin(Task("the start of a request", kind="start"))
        self._timer.resume()

    def close(self) -> None:
        """Give the pipeline its own modules back."""
        self._pipeline.timesteps_on_cpu = False
        self.rendezvous.close()
