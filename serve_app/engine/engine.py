"""The engine: one thread that owns the pipeline, the greenlets and the device.

Everybody else talks to it through a queue of commands and hears from it through events.
"""

import contextlib
import functools
import itertools
import logging
import math
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.admission import (
    RESERVE,
    Deadline,
    DeadlineEstimate,
    Reason,
    Rejection,
    decide_admission,
    infeasible,
)
from serve_app.engine.batching.batch import MergeableCall, NotMergeable
from serve_app.engine.batching.rendezvous import Call, Job, Rendezvous
from serve_app.engine.metrics import EngineMetrics, Memory, State
from serve_app.engine.model.loader import LoadedPipeline
from serve_app.engine.model.previews import PreviewMap
from serve_app.engine.model.prompt_cache import PromptCache
from serve_app.engine.model.speed import compiled, compiling, largest_bucket, padded
from serve_app.engine.request import EventCallback, Request, link_batch_peers
from serve_app.engine.scheduling.cost import CostModel
from serve_app.engine.scheduling.forecast import Forecast, Work
from serve_app.engine.scheduling.load import LoadTracker
from serve_app.engine.scheduling.policies import POLICIES, QueueEntry, RankedPolicy, Yielding
from serve_app.engine.startup.certification import Certificate
from serve_app.engine.startup.cold_start import ColdStart
from serve_app.engine.startup.warmup import warm_up
from serve_app.engine.timer import CallTimer
from serve_app.errors import (
    Cancelled,
    ConfigError,
    DiffusionServeError,
    GenerationFailed,
    InvalidRequest,
    ModelLoadError,
    Overloaded,
    Unavailable,
)
from serve_app.protocol.events import (
    Completed,
    Event,
    Failed,
    GenerationResult,
    GenerationTimings,
    Preview,
    Progress,
    Queued,
    Step,
)
from serve_app.protocol.load import ReplicaLoad
from serve_app.protocol.params import (
    INITIAL,
    AdapterSet,
    GenerationParams,
    ModelInfo,
    RequestContext,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LogEntry:
    """One line of the engine's own diary, for tests and for people who look into a replica."""

    denoiser_call: int
    """Denoiser calls made before it."""
    request: int
    what: Literal[
        "queued", "rejected", "started", "cancel_requested", "completed", "failed", "cancelled"
    ]


@dataclass(frozen=True)
class EngineStats:
    """What the engine is doing, and has done since it started."""

    waiting: int
    running: int
    denoiser_calls: int
    """Denoiser calls."""
    steps: int
    """Requests in those that succeeded."""
    forecast_error: float | None
    """Median share by which the predictions of when a request would be done were lately off."""
    log: tuple[LogEntry, ...]
    """The last few hundred, oldest first."""

    @property
    def mean_batch_size(self) -> float:
        return self.steps / self.denoiser_calls if self.denoiser_calls else 0.0


def _infeasible(solo_s: float, deadline_s: float) -> InvalidRequest:
    return InvalidRequest(
        f"deadline_s is {deadline_s:g}, and this picture takes about {solo_s:.2g} s when nobody "
        "else is here; allow more, or ask for a smaller picture or fewer steps.",
        "deadline_s",
    )


def _release(error: BaseException) -> None:
    """Drop what the frames of a traceback hold, and the traceback: they refer to each other."""
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = None


def _free_memory() -> None:
    """Let go of what is only kept for the next call."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _uuid(device: torch.device) -> str:
    """Of the GPU, as NVIDIA's tools have it."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def _memory(device: torch.device, kind: Memory) -> int:
    """In bytes."""
    if kind == "used":
        return torch.cuda.memory_allocated(device)
    if kind == "reserved":
        return torch.cuda.memory_reserved(device)
    free, total = torch.cuda.mem_get_info(device)
    return free if kind == "free" else total


def _check_device(error: BaseException) -> None:
    """Raise ``error`` if it means that this process can use its device no more.

    After such an error of CUDA every later call fails as well; the engine stops, its health check
    says so, and Serve puts another process in its place. Running out of memory is not one.
    """
    if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError):
        raise error


class Engine:
    """Paints many requests together, step by step, with one stock pipeline.

    Thread-safe: any thread may call its public methods. A context manager: leaving it
    drains, or drops all if an exception is on its way.
    """

    info: ModelInfo
    cold_start_s: float
    """From the beginning of `load`, or of the constructor, until it was ready."""

    def __init__(
        self,
        pipeline: LoadedPipeline,
        model: ModelConfig,
        config: EngineConfig | None = None,
        policy: RankedPolicy | None = None,
        start: ColdStart | None = None,
        metrics: EngineMetrics | None = None,
    ) -> None:
        """Start the engine's thread and wait until the pipeline is certified.

        ``start`` is a stopwatch that runs already, if the model was loaded for this engine;
        ``metrics`` is told what it does.

        Raises:
            ModelLoadError: if the pipeline cannot paint.
            ConfigError: if the model's defaults break the configured limits, or the profile is
                none.
        """
        self._pipeline = pipeline
        self._config = config or EngineConfig()
        self._speed = model.speed
        self._cost = CostModel(self._config.max_batch_size)
        self._policy = Yielding(policy or POLICIES[self._config.scheduling]())
        self._forecast = Forecast(self._cost)
        self._load_tracker = LoadTracker()
        self._rendezvous = Rendezvous(pipeline.sites)
        self._certificate: Certificate
        self._previews: PreviewMap | None
        self._prompts = PromptCache(self._config.prompt_cache_mib * 2**20)
        self._start = start or ColdStart()
        self._metrics = metrics or EngineMetrics(model.id)

        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._gate = threading.Lock()  # orders submissions against closing
        self._closing = False
        self._numbers = itertools.count(1)

        # Written by the engine's thread alone, but for the log, which any thread appends to.
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._at_stage: list[Request] = []  # those parked elsewhere than at a denoiser
        self._timer = CallTimer(pipeline.device)
        self._waiting_for_memory: list[Request] = []  # those that wait for memory
        self._stage_s = 0.0  # for decoding since the last denoiser call, as predicted
        self._call_s = 0.0  # for that call
        self._called_at = math.inf  # when the last call of a network was done, or the first came
        self._in_call = 0  # requests in the last denoiser call
        self._by_number: dict[int, Request] = {}
        self._denoiser_calls = 0
        self._steps = 0
        self._log: deque[LogEntry] = deque(maxlen=512)
        self._crash: BaseException | None = None

        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run_loop, name="engine", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._crash is not None:
            self._thread.join()
            if isinstance(self._crash, ConfigError):
                raise self._crash
            raise ModelLoadError(
                f"model {model.id!r}: {pipeline.class_name} cannot paint: "
                f"{type(self._crash).__name__}: {self._crash}"
            ) from self._crash
        width, height = pipeline.default_size_px
        self.info = ModelInfo(
            id=model.id,
            pipeline=pipeline.class_name,
            dtype=str(pipeline.dtype).removeprefix("torch."),
            device=str(pipeline.device),
            default_width=width,
            default_height=height,
            size_multiple=pipeline.size_multiple,
            default_steps=pipeline.default_steps,
            takes_negative_prompt=pipeline.takes_negative_prompt,
            tasks=self._certificate.tasks,
            default_strengths=pipeline.default_strengths,
            noise_schedulers=pipeline.noise_schedulers,
            fewest_steps=pipeline.fewest_steps,
            loras=pipeline.adapters.names,
            sharing=self._certificate.sharing,
            sharing_difference=self._certificate.difference,
            sharing_note=self._certificate.note,
            limits=self._config.limits,
        )
        self._report_certificate()
        try:
            GenerationParams("defaults", 0).resolved(self.info)
        except InvalidRequest as error:
            self.close()
            raise ConfigError(
                f"model {model.id!r}: what a request that names nothing gets breaks the engine's "
                f"limits: {error} Set model.default_steps, model.default_size_px or engine.limits."
            ) from None
        self.cold_start_s = self._start.total_s
        self._start.report(model.id)
        on_gpu = pipeline.device.type == "cuda"
        self._metrics.runs_on(self.info.device, _uuid(pipeline.device) if on_gpu else "")
        memory = functools.partial(_memory, pipeline.device) if on_gpu else None
        self._metrics.watch(self.replica_load, self._count, memory)

    @classmethod
    def load(cls, model: ModelConfig, config: EngineConfig | None = None) -> "Engine":
        """Load the model and start an engine on it.

        Raises:
            ConfigError: if the model or the device cannot be used.
        """
        start = ColdStart()
        pipeline = LoadedPipeline.load(model)
        start.ended("load")
        return cls(pipeline, model, config, start=start)

    # ---- for everybody -------------------------------------------------------------------------

    def submit(
        self,
        params: GenerationParams,
        on_event: EventCallback,
        context: RequestContext = INITIAL,
    ) -> int:
        """Queue a request; its number, for `cancel`. The last event is `Completed` or `Failed`.

        The only one is `Failed` with `Overloaded` if it is not taken in, and with `InvalidRequest`
        if it would take far longer than its deadline alone.

        Raises:
            InvalidRequest: if this model cannot do what is asked.
            Unavailable: if the engine is closing or has crashed.
        """
        resolved = params.resolved(self.info)
        with self._gate:
            if self._closing:
                raise Unavailable("the engine is closing; send the request to another replica.")
            number = next(self._numbers)
            now = time.perf_counter()
            entry = QueueEntry(number, now, 0.0, low_priority=params.priority == "batch")
            waited_s = 0.0 if context.sent_at is None else max(0.0, time.time() - context.sent_at)
            request = Request(number, resolved, context, on_event, now, entry, waited_s)
            self._commands.put(lambda: self._accept(request))
        return request.number

    def cancel(self, number: int) -> None:
        """Drop a request before its next step. Does nothing if it has already ended."""
        self._note(number, "cancel_requested")
        asked_at = time.perf_counter()
        self._commands.put(lambda: self._cancel(number, asked_at))

    def locate(self, number: int) -> None:
        """Have a request report where it stands: `Queued`, or `Progress` with a time to its end."""
        self._commands.put(lambda: self._locate(number))

    def generate(
        self, params: GenerationParams, on_event: EventCallback | None = None
    ) -> GenerationResult:
        """Paint one picture and wait for it. Raises what `submit` raises, and what went wrong."""
        for event in self.stream(params):
            if on_event is not None:
                on_event(event)
            match event:
                case Completed(result):
                    return result
                case Failed(error):
                    raise error
        raise AssertionError("a request ended without a last event")

    def stream(self, params: GenerationParams) -> Iterator[Event]:
        """Submit now; iterate over the events. Closing the iterator cancels the request."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        number = self.submit(params, events.put)

        def iterate() -> Iterator[Event]:
            ended = False
            try:
                while not ended:
                    event = events.get()
                    ended = isinstance(event, Completed | Failed)
                    yield event
            finally:
                if not ended:
                    self.cancel(number)

        return iterate()

    def stats(self) -> EngineStats:
        """A snapshot. Counts may be one step apart from each other."""
        return EngineStats(
            waiting=len(self._waiting),
            running=len(self._running),
            denoiser_calls=self._denoiser_calls,
            steps=self._steps,
            forecast_error=self._forecast.error,
            log=tuple(self._log),
        )

    def replica_load(self) -> ReplicaLoad:
        """What is asked of this engine, for whoever decides how many there are; quick."""
        return self._load_tracker.load(time.perf_counter())

    def _count(self, state: State) -> int:
        """Requests; of whoever is running, those in the call that was last begun."""
        if state == "queued":
            return len(self._waiting)
        in_call = min(self._in_call, len(self._running))
        return in_call if state == "running" else len(self._running) - in_call

    def check(self) -> None:
        """Raise `Unavailable` if the engine no longer works."""
        if not self._thread.is_alive():
            raise Unavailable(f"the engine has stopped: {self._crash!r}")

    def close(self, drain: bool = True) -> None:
        """Refuse new requests, finish those accepted (or fail them), and end the thread."""
        with self._gate:
            self._closing = True
            if not drain:
                self._commands.put(self._drop_all)
            self._commands.put(lambda: None)  # wakes an idle thread
        self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(drain=error is None)

    def _report_certificate(self) -> None:
        certificate, name = self._certificate, f"{self.info.id} ({self.info.pipeline})"
        wanted = self._config.max_running == 1  # and nothing was compared
        if not wanted:
            self._metrics.certified(certificate.sharing, certificate.difference)
        if certificate.sharing == "batched":
            logger.info(
                "model %s: batching=on, largest difference %.2g", name, certificate.difference
            )
            return
        logger.log(
            logging.INFO if wanted else logging.WARNING,
            "model %s: batching=off, requests %s: %s",
            name,
            "take turns" if certificate.sharing == "interleaved" else "run one after another",
            certificate.note,
        )

    # ---- for the engine's thread ---------------------------------------------------------------

    def _run_loop(self) -> None:
        # Grad mode belongs to the thread, and the pipelines' own no_grad interleave: without this
        # one around them all, the last request to finish would turn gradients on for the others.
        try:
            with torch.no_grad():
                with compiling(self._speed):
                    self._certificate, self._previews = warm_up(
                        self._pipeline,
                        self._rendezvous,
                        self._config,
                        self._speed,
                        self._cost,
                        self._start,
                    )
                with compiled(self._speed):
                    self._ready.set()
                    self._loop()
        except BaseException as error:
            self._crash = error
            if self._ready.is_set():
                logger.exception("the engine has stopped")
        finally:
            with self._gate:
                self._closing = True
            # Leave nobody waiting for a thread that is gone.
            while not self._commands.empty():
                with contextlib.suppress(Exception):
                    self._commands.get()()
            self._drop_all()
            self._rendezvous.close()
            self._ready.set()

    def _loop(self) -> None:
        while self._process_commands():
            self._start_waiting()
            if self._running:
                self._step()

    def _process_commands(self) -> bool:
        """Carry out the commands that came in; wait for one if idle. False when all is done."""
        while True:
            idle = not self._waiting and not self._running
            if idle:
                self._timer.wait()
                self._in_call = 0
            if idle and self._closing and self._commands.empty():
                return False
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return True
            if idle:
                self._called_at = time.perf_counter()
            command()

    def _accept(self, request: Request) -> None:
        entry, deadline_s = request.entry, request.params.deadline_s
        solo_s = entry.remaining_s = self._predict_remaining(request)
        if deadline_s is not None and infeasible(solo_s, deadline_s):
            self._reject(request, "deadline", _infeasible(solo_s, deadline_s))
            return  # and is no demand: it would be late on any number of replicas
        if not (entry.low_priority or request.context.is_retry):
            self._load_tracker.offered(time.perf_counter(), solo_s)
        wanted_s = deadline_s or self._config.slo_scale * solo_s
        entry.deadline_at = request.submitted_at - request.waited_s + wanted_s
        can_be_late = {other for other in self._by_number.values() if other.entry.late}
        self._by_number[request.number] = request
        self._policy.add(entry)
        now = request.accepted_at = time.perf_counter()
        order = self._in_order(now, request)
        finish_s = self._forecast.predict_all_s([self._work_left(other) for other in order])
        index = order.index(request)
        estimates = [
            DeadlineEstimate(finish, other.entry.deadline_at - now)
            for other, finish in zip(order[index:], finish_s[index:], strict=True)
            if other.params.deadline_s is not None and other not in can_be_late
        ]
        batch_fill = {
            other for other in self._by_number.values() if self._are_siblings(request, other)
        }
        queued_work_s = self._queued_work_s(request, batch_fill)
        if rejection := self._judge(request, queued_work_s, solo_s, estimates, bool(batch_fill)):
            self._policy.drop(entry)
            del self._by_number[request.number]
            error = self._overloaded(request, rejection, queued_work_s, solo_s)
            self._reject(request, rejection.reason, error)
            return
        self._note(request.number, "queued")
        self._waiting.append(request)
        self._load_tracker.accepted(now, solo_s, entry.low_priority)
        request.predicted_s = finish_s[index]
        before = sum(other.job is None for other in order[:index])
        self._emit(request, Queued(before, request.predicted_s))

    def _are_siblings(self, request: Request, other: Request) -> bool:
        order = request.context.order
        return other is not request and bool(order) and other.context.order == order

    def _queued_work_s(self, request: Request, batch_fill: set[Request]) -> float:
        """Seconds of the work that it finds, without what came with it."""
        queued_work_s = sum(
            other.entry.remaining_s
            for other in self._by_number.values()
            if other.entry.low_priority <= request.entry.low_priority
            and other is not request
            and other not in batch_fill
        )
        return queued_work_s / self._load_tracker.throughput()

    def _judge(
        self,
        request: Request,
        queued_work_s: float,
        solo_s: float,
        estimates: list[DeadlineEstimate],
        has_siblings: bool,
    ) -> Rejection | None:
        """``estimates`` of requests that name a deadline: its own first, then those it delays."""
        context, deadline_s = request.context, request.params.deadline_s
        if request.entry.low_priority:
            # It has time until it is given up; half of that, for those who come again.
            limit_s = self._config.limits.max_deadline_s / RESERVE
            return decide_admission(queued_work_s, limit_s, context)
        own = None if deadline_s is None else Deadline(deadline_s, solo_s, estimates.pop(0))
        return decide_admission(
            queued_work_s, self._config.max_backlog_s, context, own, estimates, has_siblings
        )

    def _overloaded(
        self, request: Request, rejection: Rejection, queued_work_s: float, solo_s: float
    ) -> Overloaded:
        deadline_s, reserved_s = request.params.deadline_s, request.context.reserved_s
        waiting = f"about {queued_work_s:.1f} s of work are waiting"
        if reserved_s and rejection.cause in ("backlog", "reserved"):
            waiting += f", {reserved_s:.1f} s are promised to others who were told to come again"
        match rejection.cause:
            case "backlog":
                why = f"{waiting}, and more is not taken in."
            case "late" | "reserved":
                why = (
                    f"{waiting}, and it cannot be done within {deadline_s:g} s, as deadline_s says."
                )
            case "siblings":
                why = (
                    f"its pictures cannot all be done within {deadline_s:g} s, as deadline_s says; "
                    "ask for fewer at a time, or allow more."
                )
            case "delay":
                why = f"{waiting}, and it would make another request miss its deadline."
        return Overloaded(
            why,
            "deadline_s" if rejection.reason == "deadline" else None,
            retry_after_s=max(1.0, rejection.excess_s),
            work_s=solo_s / self._load_tracker.throughput(),
        )

    def _reject(self, request: Request, reason: Reason, error: DiffusionServeError) -> None:
        self._note(request.number, "rejected")
        self._metrics.rejected(reason)
        self._emit(request, Failed(error))

    def _locate(self, number: int) -> None:
        request = self._by_number.get(number)
        if request is None:
            return
        place = self._place(request)
        if request in self._running:
            total = request.steps_done + request.steps_left
            self._emit(request, Progress(request.steps_done, total, place.eta_s))
        else:
            self._emit(request, place)

    def _place(self, request: Request) -> Queued:
        """Who waits before it, and when it should be done in the company that it has."""
        order = self._in_order(time.perf_counter(), request)
        index = order.index(request)
        works = [self._work_left(other) for other in order]
        before = sum(other.job is None for other in order[:index])
        return Queued(before, self._forecast.predict_s(works, works[index]))

    def _in_order(self, now: float, request: Request) -> list[Request]:
        """Who goes before whom, of those that this one can see: the background sees all."""
        return [
            self._by_number[entry.request]
            for entry in self._policy.order(now)
            if entry.low_priority <= request.entry.low_priority
        ]

    def _work_left(self, request: Request) -> Work:
        cost, size = self._cost, request.size
        alone = self._certificate.sharing != "batched"
        return Work(
            group=request.number if alone else (size, request.params.lora),
            size=size,
            rows=request.rows,
            calls=request.steps_left * cost.calls_per_step,
            encode_s=0.0 if request.calls else cost.predict_encode(size),
            decode_s=cost.predict_decode(size),
        )

    def _cancel(self, number: int, asked_at: float) -> None:
        if request := self._by_number.get(number):
            self._drop(request, "cancelled", Cancelled("the request was cancelled."))
            self._metrics.cancelled(time.perf_counter() - asked_at)

    def _drop(
        self, request: Request, what: Literal["failed", "cancelled"], error: DiffusionServeError
    ) -> None:
        if request.job is not None:
            request.job.kill()
        self._end(request, what, Failed(error))

    def _drop_all(self) -> None:
        """Nobody asked for this end, so nobody is told that he cancelled."""
        for request in [*self._waiting, *self._running]:
            error = Unavailable("the engine has stopped; send the request to another replica.")
            self._drop(request, "failed", error)

    def _start_waiting(self) -> None:
        most = 1 if self._certificate.sharing == "alone" else self._config.max_running
        while self._waiting and len(self._running) < most:
            now = time.perf_counter()
            by_entry = {request.entry: request for request in self._waiting}
            low_priority = sum(request.entry.low_priority for request in self._running)
            if low_priority >= max(1, most // 2):
                # Those of the background keep their places for as long as others leave no time.
                by_entry = {entry: one for entry, one in by_entry.items() if not entry.low_priority}
            if len(self._running) >= most - most // 8:
                # The last places are for those that can be on time: the late may stay for long.
                by_entry = {
                    entry: one
                    for entry, one in by_entry.items()
                    if not (entry.late or entry.low_priority)
                }
            if not by_entry:
                return
            request = by_entry[self._policy.first(list(by_entry), now)]
            self._waiting.remove(request)
            self._running.append(request)
            self._note(request.number, "started")
            request.started_at = now
            self._trace(request)
            request.job = Job(functools.partial(self._generate, request))
            self._resume(request, request.job.start)

    def _generate(self, request: Request) -> Tensor:
        previews_due = set(request.params.preview_steps)

        def on_step(done: int, total: int) -> None:
            request.steps_done, request.steps_total = done, total
            if request.context.trace:
                ended_s = request.denoised_at - request.encoded_at
                request.steps.append(Step(ended_s, self._in_call))
            self._emit(request, Progress(done, total))

        def on_latents(latents: Tensor) -> None:
            step = request.steps_done + 1
            if step in previews_due and self._previews is not None:
                previews_due.remove(step)
                pixels = self._previews(latents, *request.size)
                if pixels is not None:
                    self._metrics.previewed()
                    self._emit(request, Preview(step, pixels))

        tokens, request.warnings = self._pipeline.read_prompt(request.params)
        request.prompt_tokens = tokens
        watch = on_latents if previews_due else None
        return self._pipeline.generate(
            request.params, on_step, on_latents=watch, prompt_cache=self._prompts
        )[0]

    def _step(self) -> None:
        """One denoiser call, for as many requests as fit together; or one of another module."""
        now = time.perf_counter()
        if (request := self._next_at_stage(now)) is not None:
            self._run_stage(request)
            return
        chosen = self._policy.choose(now, self._cap)
        self._stage_s = 0.0
        batch = [self._by_number[entry.request] for entry in chosen]
        for request, outcome in zip(batch, self._denoise(batch), strict=True):
            assert request.job is not None
            if isinstance(outcome, Exception):
                self._fail(request, outcome)
            else:
                request.calls += 1
                request.denoised_at = time.perf_counter()
                self._resume(request, functools.partial(request.job.resume, outcome))
                if request.job is not None and not request.steps_left:
                    self._trace(request)  # it is on its way to the decoder

    def _next_at_stage(self, now: float) -> Request | None:
        """The request, parked elsewhere than at a denoiser, whose turn it is before the next step.

        Whoever is on the way to a denoiser goes first: the sooner, the larger the batches. Of those
        that have done their steps one call follows each denoiser call, and more as long as they
        take no longer than that: nobody's step waits longer for another's decoding than for a step,
        or for one block of the decoder. Whoever began to decode ends it before the next one does,
        for half a decoding holds much memory. The background waits until nobody else can go on.
        """
        parked = [request for request in self._running if request not in self._waiting_for_memory]
        if any(not request.entry.low_priority for request in parked):
            parked = [request for request in parked if not request.entry.low_priority]
        at_stage = [request for request in self._at_stage if request in parked]
        by_entry = {request.entry: request for request in at_stage if request.steps_left}
        if by_entry:
            return by_entry[self._policy.first(list(by_entry), now)]
        if not at_stage:
            return None
        request = min(at_stage, key=lambda request: request.entry.turn)
        stage_s = self._predict_stage(request)
        fits = not self._stage_s or self._stage_s + stage_s <= self._call_s
        return request if fits or len(parked) == len(at_stage) else None

    def _predict_stage(self, request: Request) -> float:
        """Seconds of the call at which it is parked; without end while it is not known."""
        return self._cost.predict_stage(request.call.site, request.size) or math.inf

    def _run_stage(self, request: Request) -> None:
        """Answer a call of a module other than a denoiser."""
        self._at_stage.remove(request)
        # Not the call itself: what it holds must go when its job goes on.
        site, size, encoding = request.call.site, request.size, not request.calls
        if not request.steps_left:
            self._stage_s += self._predict_stage(request)

        def took(seconds: float) -> None:
            self._cost.observe_stage(site, size, seconds)
            if encoding:
                request.encode_s += seconds
                self._metrics.encoded(seconds)
            else:
                request.non_denoiser_s += seconds
                self._metrics.decoded(seconds)

        try:
            output = self._run(request.call, request.params.lora, took)
        except Exception as error:
            self._fail(request, error)
            return
        assert request.job is not None
        self._resume(request, functools.partial(request.job.resume, output))

    def _fail(self, request: Request, error: Exception) -> None:
        """Its call raised. What only lacks memory is tried again when another request has ended."""
        _check_device(error)
        assert request.job is not None
        others = len(self._running) - len(self._waiting_for_memory) - 1
        if isinstance(error, torch.OutOfMemoryError):
            self._metrics.out_of_memory()
        if isinstance(error, torch.OutOfMemoryError) and others:
            logger.warning("request %d waits for memory: %s", request.number, str(error))
            _release(error)
            self._waiting_for_memory.append(request)
            _free_memory()
        else:
            self._resume(request, functools.partial(request.job.fail, error))

    def _run(self, call: Call, adapters: AdapterSet, took: Callable[[float], None]) -> Any:
        """Run the module: what it returns; ``took`` is told the seconds."""
        if self._pipeline.adapters.switch(adapters):
            self._metrics.switched_adapters()
        self._metrics.paused(time.perf_counter() - self._called_at)
        try:
            return self._timer.run(self._rendezvous.forward, call, took)
        finally:
            self._called_at = time.perf_counter()

    def _cap(self, entry: QueueEntry, within_s: float) -> int:
        request = self._by_number[entry.request]
        cap = self._cost.cap(request.size, request.rows, within_s)
        return largest_bucket(cap) if self._speed.compile else cap

    def _denoise(self, batch: Sequence[Request]) -> list[Any]:
        """Each request's share of the output, or the exception that its own call raised."""
        size = 1  # of the parts to try next
        try:
            return self._forward(batch)
        except Exception as error:
            _check_device(error)
            # What the failed call holds goes first, or a retry after running out of memory would
            # find as little as the call did.
            traceback.clear_frames(error.__traceback__)
            if len(batch) == 1:
                return [error]
            if isinstance(error, torch.OutOfMemoryError):
                self._metrics.out_of_memory()
                size = self._cost.lower_cap(batch[0].size, len(batch))
            failure = repr(error)
        _free_memory()
        logger.warning(
            "a denoiser call for %d requests failed, trying %d at a time: %s",
            len(batch),
            size,
            failure,
        )
        parts = [batch[start : start + size] for start in range(0, len(batch), size)]
        return [outcome for part in parts for outcome in self._denoise(part)]

    def _forward(self, batch: Sequence[Request]) -> list[Any]:
        """One denoiser call and each request's share of what it returns."""
        self._denoiser_calls += 1
        size, rows = batch[0].size, sum(request.rows for request in batch)
        self._call_s = self._cost.predict_call(size, rows)
        solo_s = sum(self._cost.predict_call(size, request.rows) for request in batch)

        def took(seconds: float) -> None:
            self._load_tracker.called(solo_s, seconds)
            self._cost.observe_call(size, rows, len(batch), seconds)
            self._metrics.called(size, len(batch), seconds)

        self._in_call = len(batch)
        calls = [request.mergeable for request in batch if request.mergeable]
        adapters = batch[0].params.lora
        if calls:
            spec = self._certificate.specs[calls[0].call.site]
            filled = padded(calls) if self._speed.compile else calls
            output = self._run(spec.merge(filled), adapters, took)
            outputs = spec.split(output, filled)[: len(calls)]
        else:
            [request] = batch
            outputs = [self._run(request.call, adapters, took)]
        self._steps += len(batch)
        link_batch_peers(batch)
        return outputs

    def _resume(self, request: Request, switch: Callable[[], None]) -> None:
        """Run its job up to where it parks or ends, and see to what it did."""
        started_at = time.perf_counter()
        switch()
        took_s = time.perf_counter() - started_at
        if request.calls:
            request.non_denoiser_s += took_s
        else:
            request.encode_s += took_s
        self._on_yield(request)

    def _on_yield(self, request: Request) -> None:
        """After a job has run: note where it parked, or report how it ended."""
        job = request.job
        assert job is not None
        if job.call is not None:
            self._park(request, job.call)
        elif job.error is not None:
            _check_device(job.error)
            logger.error("request %d failed", request.number, exc_info=job.error)
            error = GenerationFailed(
                f"the pipeline failed: {type(job.error).__name__}: {job.error}"
            )
            _release(job.error)
            self._end(request, "failed", Failed(error))
        else:
            now = time.perf_counter()
            took_s = now - request.accepted_at
            self._timer.afterwards(functools.partial(self._learn_from, request, took_s))
            result = GenerationResult(
                params=request.params,
                pixels=job.result,
                warnings=request.warnings,
                prompt_tokens=request.prompt_tokens,
                timings=GenerationTimings(
                    queue_s=request.started_at - request.submitted_at,
                    encode_s=request.encoded_at - request.started_at,
                    denoise_s=request.denoised_at - request.encoded_at,
                    decode_s=now - request.denoised_at,
                ),
                ended_at=now,
            )
            self._metrics.generated(request.size)
            if not request.entry.low_priority:
                in_time = now <= request.entry.deadline_at
                self._metrics.due(in_time, request.params.deadline_s is not None)
            self._end(request, "completed", Completed(result))

    def _learn_from(self, request: Request, took_s: float) -> None:
        """A finished request makes later predictions better."""
        self._cost.observe_request(
            request.size,
            request.steps_done,
            request.calls,
            request.encode_s,
            request.non_denoiser_s,
        )
        if request.entry.low_priority:
            return  # its end was up to the others
        error = self._forecast.observe(request.predicted_s, took_s)
        if error is not None:
            self._metrics.forecast_off(error)

    def _park(self, request: Request, call: Call) -> None:
        entry = request.entry
        if call.site not in self._pipeline.denoisers:
            request.mergeable = None
            self._update_remaining(request)
            self._at_stage.append(request)
            return
        if request.calls:
            self._cost.observe_between(request.size, request.non_denoiser_s)
            request.non_denoiser_s = 0.0
        elif not request.encoded_at:
            request.encoded_at = time.perf_counter()
            self._trace(request)
        request.mergeable = self._prepared(call)
        if request.mergeable is not None:
            request.rows = float(request.mergeable.length)
        key = request.mergeable.key if request.mergeable else None
        entry.key = None if key is None else (key, request.params.lora)
        entry.step_s = self._cost.predict_call(request.size, request.rows)
        self._update_remaining(request)
        self._policy.park(entry)

    def _update_remaining(self, request: Request) -> None:
        """Less of it is left than there was."""
        entry = request.entry
        before_s, entry.remaining_s = entry.remaining_s, self._predict_remaining(request)
        now = time.perf_counter()
        self._load_tracker.update_remaining(now, before_s, entry.remaining_s, entry.low_priority)

    def _predict_remaining(self, request: Request) -> float:
        """Seconds from here to its end, alone on the device."""
        cost, size = self._cost, request.size
        decode_s = cost.predict_decode(size)
        if request.calls and not request.steps_left:
            return max(0.0, decode_s - request.non_denoiser_s)
        steps_s = cost.predict_steps(size, request.steps_left, request.rows)
        if request.calls:
            return steps_s + decode_s
        return max(0.0, cost.predict_encode(size) - request.encode_s) + steps_s + decode_s

    def _prepared(self, call: Call) -> MergeableCall | None:
        spec = self._certificate.specs.get(call.site)
        try:
            return spec.prepare(call) if spec else None
        except NotMergeable:
            return None
        except Exception:
            logger.exception(
                "a call of %s cannot be compared with others: it runs alone", call.site
            )
            return None

    def _end(
        self,
        request: Request,
        what: Literal["completed", "failed", "cancelled"],
        event: Completed | Failed,
    ) -> None:
        self._note(request.number, what)
        if request in self._running:
            self._running.remove(request)
        else:
            self._waiting.remove(request)
        for parked in (self._at_stage, self._waiting_for_memory):
            if request in parked:
                parked.remove(request)
        # Whoever submitted it may keep its callback for long, and with it all that hangs here.
        request.job = None
        request.mergeable = None
        self._policy.drop(request.entry)
        del self._by_number[request.number]
        self._load_tracker.ended(
            time.perf_counter(), request.entry.remaining_s, request.entry.low_priority
        )
        self._trace(request)
        self._emit(request, event)
        self._retry_waiting_for_memory()

    def _retry_waiting_for_memory(self) -> None:
        waiting_for_memory, self._waiting_for_memory = self._waiting_for_memory, []
        for request in waiting_for_memory:
            self._park(request, request.call)

    def _note(self, number: int, what: Any) -> None:
        self._log.append(LogEntry(self._denoiser_calls, number, what))

    def _trace(self, request: Request) -> None:
        if request.context.trace:
            self._emit(request, request.timeline)

    def _emit(self, request: Request, event: Event) -> None:
        try:
            request.on_event(event)
        except Exception:
            logger.exception("request %d: the receiver of its events failed", request.number)
