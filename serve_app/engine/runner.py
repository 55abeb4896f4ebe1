"""The runner: advances a request's job from call to call, and reports how it goes.

A job is the stock pipeline in a greenlet. It runs until the pipeline calls a module that the
rendezvous watches; there it parks, and the scheduler decides when the call runs.
"""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor

from serve_app.engine.batching.extrapolation import Extrapolator
from serve_app.engine.batching.rendezvous import Call, Job
from serve_app.engine.batching.transfers import NonBlockingCopies
from serve_app.engine.device import check_device, free_memory, is_out_of_memory, release
from serve_app.engine.executor import Executor
from serve_app.engine.metrics import EngineMetrics, State
from serve_app.engine.model.call_hooks import report_timesteps
from serve_app.engine.model.finite import FiniteCheck
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.model.previews import PreviewMap
from serve_app.engine.model.prompt_cache import PromptCache
from serve_app.engine.predictor import Predictor
from serve_app.engine.request import Request
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.scheduling.load import LoadTracker
from serve_app.engine.stats import EventLog, RequestEvent
from serve_app.errors import (
    ContentPolicyViolation,
    DiffusionServeError,
    GenerationFailed,
    Unavailable,
)
from serve_app.protocol.events import (
    Completed,
    DenoiserCalls,
    Event,
    Failed,
    GenerationResult,
    GenerationTimings,
    Preview,
    Progress,
    Step,
)

logger = logging.getLogger(__name__)

NO_PREVIEWS = (
    "no previews are sent: gateway.safety is 'block', and only finished images can be checked."
)


class Runner:
    """Starts, resumes and ends jobs. Used by the engine's thread only."""

    previews: PreviewMap | None = None
    """Map from latents to small images; ``None`` before the warm-up, or if it found none."""

    def __init__(
        self,
        pipeline: LoadedPipeline,
        prompts: PromptCache,
        scheduler: Scheduler,
        executor: Executor,
        predictor: Predictor,
        load_tracker: LoadTracker,
        metrics: EngineMetrics,
        log: EventLog,
    ) -> None:
        self._pipeline = pipeline
        self._prompts = prompts
        self._scheduler = scheduler
        self._executor = executor
        self._predictor = predictor
        self._load_tracker = load_tracker
        self._metrics = metrics
        self._log = log
        on_cpu = pipeline.device.type == "cpu"
        self._copies = contextlib.nullcontext() if on_cpu else NonBlockingCopies()

    # ---- what the engine does with a request -----------------------------------------------------

    def start(self, request: Request) -> None:
        """Run the pipeline up to its first watched call."""
        self._note(request, "started")
        request.started_at = time.perf_counter()
        self._trace(request)
        extrapolator = request.extrapolator = self._new_extrapolator(request)
        answer = extrapolator.answer if extrapolator else None
        request.job = Job(functools.partial(self._generate, request), answer)
        self._switch(request, request.job.start)

    def _new_extrapolator(self, request: Request) -> Extrapolator | None:
        """Return what answers some of its denoiser calls, if it asks for that."""
        level = request.params.acceleration
        assert level is not None
        if level == "none":
            return None
        most_error = self._pipeline.acceleration.most_error(level)
        return Extrapolator(most_error, self._pipeline.denoisers)

    def finish_denoiser_call(self, request: Request, outcome: Any) -> None:
        """Resume a request with its share of a denoiser call, or with the exception that it got."""
        assert request.job is not None
        if isinstance(outcome, Exception):
            self.fail(request, outcome)
            return
        request.calls += 1
        request.denoised_at = time.perf_counter()
        self.resume(request, outcome)
        if request.job is not None and not request.steps_left:
            self._trace(request)  # it is on its way to the decoder

    def resume(self, request: Request, output: Any) -> None:
        """Answer the parked call, and run the pipeline up to the next one or to its end."""
        assert request.job is not None
        self._switch(request, functools.partial(request.job.resume, output))

    def fail(self, request: Request, error: Exception) -> None:
        """Raise ``error`` from the parked call. A lack of memory is retried when a request ends."""
        check_device(error)
        assert request.job is not None
        if is_out_of_memory(error):
            self._metrics.out_of_memory()
            if self._scheduler.wait_for_memory(request):
                logger.warning("request %d waits for memory: %s", request.number, str(error))
                release(error)
                free_memory()
                return
        self._switch(request, functools.partial(request.job.fail, error))

    def drop(
        self, request: Request, what: Literal["failed", "cancelled"], error: DiffusionServeError
    ) -> None:
        """End a request before its time."""
        if request.job is not None:
            request.job.kill()
        self._note(request, what)
        self._end(request, Failed(error))

    def fail_waiting(self, number: int, error: DiffusionServeError) -> None:
        """End a request that cannot start, unless it has ended."""
        if request := self._scheduler.get(number):
            self.drop(request, "failed", error)

    def fail_all(self, reason: str) -> None:
        """End all requests, so that they are sent to another replica."""
        for request in list(self._scheduler.requests):
            try:
                self.drop(request, "failed", Unavailable(reason))
            except Exception:
                logger.exception("request %d could not be dropped", request.number)

    def report(self, request: Request, what: RequestEvent, event: Event) -> None:
        """Log what happened to a request, and send the event."""
        self._note(request, what)
        self.emit(request, event)

    def emit(self, request: Request, event: Event) -> None:
        """Send an event to the submitter of the request."""
        try:
            request.on_event(event)
        except Exception:
            logger.exception("request %d: the receiver of its events failed", request.number)

    # ---- the job ---------------------------------------------------------------------------------

    def _generate(self, request: Request) -> Tensor:
        """Run the pipeline for one request, inside its greenlet."""
        previews_due = set(request.params.preview_steps)

        def on_step(done: int, total: int) -> None:
            request.steps_done, request.steps_total = done, total
            if request.context.trace:
                ended_s = request.denoised_at - request.encoded_at
                request.steps.append(Step(ended_s, self._executor.in_call))
            self.emit(request, Progress(done, total))

        def on_latents(latents: Tensor) -> None:
            step = request.steps_done + 1
            if step in previews_due and self.previews is not None:
                previews_due.remove(step)
                pixels = self.previews(latents, *request.size)
                if pixels is not None:
                    self._metrics.previewed()
                    self.emit(request, Preview(step, pixels))

        def on_timestep(timestep: float, timesteps: Sequence[float]) -> None:
            # By the request, which lets go of it: the pipeline's copy lives until the next garbage
            # collection.
            if request.extrapolator is not None:
                request.extrapolator.stepped(timestep, timesteps)

        report = functools.partial(report_timesteps, on_timestep=on_timestep)
        tokens, request.warnings = self._pipeline.read_prompt(request.params)
        request.prompt_tokens = tokens
        if previews_due and self._pipeline.safety.blocks:
            previews_due.clear()
            request.warnings += (NO_PREVIEWS,)
        pixels, request.safety = self._pipeline.generate_checked(
            request.params,
            on_step,
            on_latents=on_latents if previews_due else None,
            prompt_cache=self._prompts,
            on_noise_scheduler=report if request.extrapolator else None,
        )
        # Here, because it needs memory: an error fails only this request.
        request.check = FiniteCheck(pixels, request.params, self._pipeline.dtype)
        return pixels

    def _switch(self, request: Request, switch: Callable[[], None]) -> None:
        """Run the job up to where it parks or ends, then act on that."""
        with self._copies:
            switch()
        job = request.job
        assert job is not None
        arrived = job.call is not None and job.call.site in self._pipeline.denoisers
        encoded = arrived and not request.encoded_at
        self._executor.resumed(functools.partial(self._took, request, request.calls, arrived))
        if job.call is not None:
            if encoded:
                # The device may know the true time later only.
                request.encoded_at = request.encoded_at or time.perf_counter()
                self._trace(request)
            self._queue(request, job.call)
        elif job.error is not None:
            self._job_failed(request, job.error)
        else:
            self._job_completed(request, job.result)

    def _took(
        self, request: Request, calls: int, arrived: bool, seconds: float, ended_at: float
    ) -> None:
        """Note the time of a job after this many denoiser calls, up to where it parked or ended.

        ``arrived`` at the denoiser, the time since its last denoiser call is complete.
        """
        if not calls:
            request.encode_s += seconds
            if arrived:
                request.encoded_at = ended_at
            return
        request.non_denoiser_s += seconds
        if arrived:
            self._predictor.observe_between(request.work, request.non_denoiser_s)
            request.non_denoiser_s = 0.0

    def _queue(self, request: Request, call: Call) -> None:
        """Queue a parked call, for the first time or again after a lack of memory."""
        if call.site not in self._pipeline.denoisers:
            request.mergeable = None
            self._update_remaining(request)
            self._scheduler.park_at_stage(request)
            return
        entry = request.entry
        request.mergeable = self._executor.prepare(call)
        if request.mergeable is not None:
            request.rows = float(request.mergeable.length)
        key = request.mergeable.key if request.mergeable else None
        entry.key = None if key is None else (key, request.params.lora)
        entry.step_s = self._predictor.step_s(request)
        self._update_remaining(request)
        self._scheduler.park_at_denoiser(request)

    def _update_remaining(self, request: Request) -> None:
        """Predict the remaining work anew, for the policy and for the load."""
        entry = request.entry
        before_s, entry.remaining_s = entry.remaining_s, self._predictor.remaining_s(request)
        now = time.perf_counter()
        self._load_tracker.update_remaining(now, before_s, entry.remaining_s, entry.low_priority)

    # ---- ends ------------------------------------------------------------------------------------

    def _job_failed(self, request: Request, error: BaseException) -> None:
        check_device(error)
        logger.error("request %d failed", request.number, exc_info=error)
        failure = GenerationFailed(f"the pipeline failed: {type(error).__name__}: {error}")
        release(error)
        self._note(request, "failed")
        self._end(request, Failed(failure))

    def _job_completed(self, request: Request, pixels: Tensor) -> None:
        now = time.perf_counter()
        check = request.check
        assert check is not None
        if request.extrapolator is not None:
            request.extrapolated = request.extrapolator.answered
        block = self._act_on_verdict(request, check)
        what: RequestEvent = "completed" if block is None else "failed"
        self._executor.when_done(functools.partial(self._done, request, check, what))
        result = GenerationResult(
            params=request.params,
            pixels=pixels,
            warnings=request.warnings,
            prompt_tokens=request.prompt_tokens,
            timings=GenerationTimings(
                queue_s=request.started_at - request.submitted_at,
                encode_s=request.encoded_at - request.started_at,
                denoise_s=request.denoised_at - request.encoded_at,
                decode_s=now - request.denoised_at,
            ),
            calls=DenoiserCalls(request.calls, request.extrapolated),
            ended_at=now,
            not_finite=check.error,
            safety=request.safety,
        )
        self._end(request, Completed(result) if block is None else Failed(block))

    def _done(
        self, request: Request, check: FiniteCheck, what: RequestEvent, ended_at: float
    ) -> None:
        """Learn from an image that the device has completed, and count it if it is finite."""
        self._predictor.learn_from(request, ended_at - request.accepted_at)
        if (error := check.error()) is not None:
            logger.error("request %d failed: %s", request.number, error)
            self._note(request, "failed")
            return
        self._note(request, what)
        self._metrics.generated(request.size)
        self._metrics.extrapolated(request.extrapolated)
        if not request.entry.low_priority:
            in_time = ended_at <= request.entry.deadline_at
            self._metrics.due(in_time, request.params.deadline_s is not None)

    def _act_on_verdict(
        self, request: Request, check: FiniteCheck
    ) -> ContentPolicyViolation | None:
        """Note a flagged image in the warnings, or return the error that replaces it."""
        if request.safety is None or not request.safety.flagged:
            return None
        if check.error() is not None:  # the checker has waited for the device, and saw black
            return None
        self._metrics.flagged()
        seed = request.params.seed
        flagged = f"the safety checker flagged the image with seed {seed} as possibly unsafe."
        if self._pipeline.safety.blocks:
            return ContentPolicyViolation(
                f"{flagged} This server does not return it: change the prompt, or the seed."
            )
        request.warnings += (flagged,)
        return None

    def _end(self, request: Request, event: Completed | Failed) -> None:
        """Remove the request, send its last event, and retry requests that lacked memory."""
        # The submitter may keep its callback for long, and with it all that hangs on the request.
        request.job = None
        request.mergeable = None
        request.extrapolator = None
        self._scheduler.remove(request)
        entry = request.entry
        self._load_tracker.ended(time.perf_counter(), entry.remaining_s, entry.low_priority)
        self._trace(request)
        self.emit(request, event)
        for waiting in self._scheduler.take_waiting_for_memory():
            self._queue(waiting, waiting.call)

    # ---- reports ---------------------------------------------------------------------------------

    def count(self, state: State) -> int:
        """Count requests. Of the running ones, those in the last denoiser call are "running"."""
        if state == "queued":
            return len(self._scheduler.waiting)
        running = len(self._scheduler.running)
        in_call = min(self._executor.in_call, running)
        return in_call if state == "running" else running - in_call

    def _note(self, request: Request, what: RequestEvent) -> None:
        self._log.note(self._executor.denoiser_calls, request.number, what)

    def _trace(self, request: Request) -> None:
        if request.context.trace:
            self.emit(request, request.timeline)
