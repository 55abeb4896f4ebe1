"""The engine: one thread that owns the pipeline, its greenlets and the device.

Other threads send it commands through a queue, and receive events. The loop is short: process the
commands, start waiting requests, run one call, and repeat. `Scheduler` chooses what runs,
`Executor` runs it, and `Runner` advances the jobs of the requests.
"""

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

import torch

from serve_app.config import EngineConfig, ModelConfig
from serve_app.engine.admission import AdmissionControl
from serve_app.engine.device import gpu_uuid, memory_reader
from serve_app.engine.executor import Executor
from serve_app.engine.metrics import EngineMetrics, State
from serve_app.engine.model.loader import LoadedPipeline
from serve_app.engine.model.prompt_cache import PromptCache
from serve_app.engine.model.speed import compiled, compiling, largest_bucket
from serve_app.engine.predictor import Predictor
from serve_app.engine.request import EventCallback, Request
from serve_app.engine.runner import Runner
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.scheduling.cost import CostModel
from serve_app.engine.scheduling.load import LoadTracker
from serve_app.engine.scheduling.policies import POLICIES, QueueEntry, RankedPolicy
from serve_app.engine.startup.certification import Certificate
from serve_app.engine.startup.cold_start import ColdStart
from serve_app.engine.startup.info import describe_model, log_sharing
from serve_app.engine.startup.warmup import warm_up
from serve_app.engine.stats import EngineStats, RequestLog
from serve_app.errors import Cancelled, ConfigError, ModelLoadError, Unavailable
from serve_app.protocol.events import Completed, Event, Failed, GenerationResult, Queued
from serve_app.protocol.load import ReplicaLoad
from serve_app.protocol.params import INITIAL, GenerationParams, ModelInfo, RequestContext

logger = logging.getLogger(__name__)


class Engine:
    """Serves many requests together, step by step, with one stock pipeline.

    Thread-safe: any thread may call its public methods. A context manager: leaving it drains the
    engine, or drops all requests if an exception is on its way.
    """

    info: ModelInfo
    """Description of the loaded model."""
    certificate: Certificate
    """How requests share the pipeline, found or confirmed at the start."""
    cold_start: ColdStart
    """Durations of the start, by phase."""
    cost: CostModel
    """Measured costs. Only the engine's thread changes it."""
    metrics: EngineMetrics
    """Prometheus metrics of this engine."""
    prompts: PromptCache
    """Encoded prompts of earlier requests. Only the engine's thread changes it."""

    def __init__(
        self,
        pipeline: LoadedPipeline,
        model: ModelConfig,
        config: EngineConfig | None = None,
        policy: RankedPolicy | None = None,
        start: ColdStart | None = None,
        metrics: EngineMetrics | None = None,
    ) -> None:
        """Start the engine's thread, and wait until the pipeline is certified.

        ``policy`` replaces the configured one. ``start`` is a stopwatch that is already running,
        if the model was loaded for this engine. ``metrics`` are by default those of the model's id.

        Raises:
            ModelLoadError: if the pipeline cannot generate an image.
            ConfigError: if the model's defaults break the configured limits, or the profile file
                is not one.
        """
        self._config = config or EngineConfig()
        self._speed = model.speed
        self._pipeline = pipeline
        self.metrics = metrics or EngineMetrics(model.id)
        self._load_tracker = LoadTracker()
        self._log = RequestLog()
        self.cold_start = start or ColdStart()
        self.cost = CostModel(self._config.max_batch_size)
        self.prompts = PromptCache(self._config.prompt_cache_mib * 2**20)
        self._predictor = Predictor(self.cost, self.metrics)
        self._scheduler = Scheduler(
            policy or POLICIES[self._config.scheduling](),
            self.cost,
            largest_bucket if self._speed.compile else None,
        )
        self._executor = Executor(
            pipeline, self._speed, self.cost, self._load_tracker, self.metrics
        )
        self._runner = Runner(
            pipeline,
            self.prompts,
            self._scheduler,
            self._executor,
            self._predictor,
            self._load_tracker,
            self.metrics,
            self._log,
        )
        self._admission = AdmissionControl(
            self._config, self._scheduler, self._predictor, self._load_tracker, self.metrics
        )

        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._gate = threading.Lock()  # orders submissions against closing
        self._closing = False
        self._numbers = itertools.count(1)
        self._max_running = self._config.max_running
        self._crash: BaseException | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=[model], name="engine", daemon=True)
        self._thread.start()
        self._ready.wait()
        self._check_start(model)
        self._report_start()

    @classmethod
    def load(cls, model: ModelConfig, config: EngineConfig | None = None) -> "Engine":
        """Load the model, and start an engine on it.

        Raises:
            ConfigError: if the model or the device cannot be used.
        """
        start = ColdStart()
        pipeline = LoadedPipeline.load(model)
        start.ended("load")
        return cls(pipeline, model, config, start=start)

    def _check_start(self, model: ModelConfig) -> None:
        """Raise the error with which the start failed, if it did."""
        if self._crash is None:
            return
        self._thread.join()
        if isinstance(self._crash, ConfigError):
            raise self._crash
        raise ModelLoadError(
            f"model {model.id!r}: {self._pipeline.class_name} cannot generate an image: "
            f"{type(self._crash).__name__}: {self._crash}"
        ) from self._crash

    def _report_start(self) -> None:
        batching_wanted = self._config.max_running > 1  # without it nothing was compared
        if batching_wanted:
            self.metrics.certified(self.certificate.sharing, self.certificate.difference)
        log_sharing(self.info, batching_wanted)
        self.cold_start.report(self.info.id)
        device = self._pipeline.device
        self.metrics.runs_on(self.info.device, gpu_uuid(device))
        self.metrics.watch(self.replica_load, self._count, memory_reader(device))

    # ---- for all threads -------------------------------------------------------------------------

    def submit(
        self,
        params: GenerationParams,
        on_event: EventCallback,
        context: RequestContext = INITIAL,
    ) -> int:
        """Queue a request, and return its number for `cancel` and `locate`.

        The last event is `Completed` or `Failed`. A request that is not admitted has one event:
        `Failed` with `Overloaded`, or with `InvalidRequest` if its deadline is far too short.

        Raises:
            InvalidRequest: if the model cannot do what the request asks for.
            Unavailable: if the engine is closing or has stopped.
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
        return number

    def cancel(self, number: int) -> None:
        """Drop a request before its next step. Does nothing if it has already ended."""
        self._log.note(self._executor.denoiser_calls, number, "cancel_requested")
        requested_at = time.perf_counter()
        self._commands.put(lambda: self._cancel(number, requested_at))

    def locate(self, number: int) -> None:
        """Make a request report its position: `Queued`, or `Progress` with an ETA."""
        self._commands.put(lambda: self._locate(number))

    def generate(
        self, params: GenerationParams, on_event: EventCallback | None = None
    ) -> GenerationResult:
        """Generate one image and wait for it.

        Raises:
            DiffusionServeError: as `submit` does, and the error of a request that failed.
        """
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
        """Submit now, and return the events. Closing the iterator cancels the request."""
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
        """Return a snapshot. Its counts may be one step apart from each other."""
        return EngineStats(
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running),
            denoiser_calls=self._executor.denoiser_calls,
            steps=self._executor.steps,
            forecast_error=self._predictor.error,
            log=self._log.entries,
        )

    def replica_load(self) -> ReplicaLoad:
        """Return the load that the autoscaling policy reads. Takes microseconds."""
        return self._load_tracker.load(time.perf_counter())

    def _count(self, state: State) -> int:
        """Count requests. Of the running ones, those in the last denoiser call are "running"."""
        if state == "queued":
            return len(self._scheduler.waiting)
        running = len(self._scheduler.running)
        in_call = min(self._executor.in_call, running)
        return in_call if state == "running" else running - in_call

    def check(self) -> None:
        """Raise `Unavailable` if the engine has stopped."""
        if not self._thread.is_alive():
            raise Unavailable(f"the engine has stopped: {self._crash!r}")

    def close(self, drain: bool = True) -> None:
        """Reject new requests, finish the admitted ones (or fail them), and end the thread."""
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

    # ---- the engine's thread ---------------------------------------------------------------------

    def _run(self, model: ModelConfig) -> None:
        """Warm up, then loop until the engine closes or the device fails."""
        # Grad mode belongs to the thread, and the pipelines' own no_grad contexts interleave.
        # Without one around them all, the last request to finish would turn gradients on.
        try:
            with torch.no_grad():
                with compiling(self._speed):
                    self._warm_up(model)
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
            # No request may wait for a thread that has ended.
            while not self._commands.empty():
                with contextlib.suppress(Exception):
                    self._commands.get()()
            self._drop_all()
            self._executor.close()
            self._ready.set()

    def _warm_up(self, model: ModelConfig) -> None:
        self.certificate, self._runner.previews = warm_up(
            self._pipeline,
            self._executor.rendezvous,
            self._config,
            self._speed,
            self.cost,
            self.cold_start,
        )
        self.info = describe_model(model, self._config, self._pipeline, self.certificate)
        self._executor.specs = self.certificate.specs
        self._predictor.batched = self.certificate.sharing == "batched"
        if self.certificate.sharing == "alone":
            self._max_running = 1

    def _loop(self) -> None:
        while self._process_commands():
            while request := self._scheduler.start_next(time.perf_counter(), self._max_running):
                self._runner.start(request)
            if self._scheduler.running:
                self._step()

    def _step(self) -> None:
        """Run one denoiser call, for as many requests as fit together, or the call of one stage."""
        now = time.perf_counter()
        if (request := self._scheduler.next_stage(now)) is not None:
            try:
                output = self._executor.run_stage(request)
            except Exception as error:
                self._runner.fail(request, error)
            else:
                self._runner.resume(request, output)
            return
        batch = self._scheduler.next_batch(now)
        for request, outcome in zip(batch, self._executor.denoise(batch), strict=True):
            self._runner.finish_step(request, outcome)

    # ---- commands --------------------------------------------------------------------------------

    def _process_commands(self) -> bool:
        """Run the commands that have arrived; wait for one if idle. ``False`` when all is done."""
        while True:
            idle = not self._scheduler.waiting and not self._scheduler.running
            if idle:
                self._executor.wait_idle()
            if idle and self._closing and self._commands.empty():
                return False
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return True
            if idle:
                self._executor.work_arrived()
            command()

    def _accept(self, request: Request) -> None:
        position = self._admission.admit(request)
        if isinstance(position, Queued):
            self._runner.report(request, "queued", position)
        else:
            self._runner.report(request, "rejected", Failed(position))

    def _locate(self, number: int) -> None:
        if request := self._scheduler.get(number):
            self._runner.emit(request, self._admission.locate(request))

    def _cancel(self, number: int, requested_at: float) -> None:
        if request := self._scheduler.get(number):
            self._runner.drop(request, "cancelled", Cancelled("the request was cancelled."))
            self.metrics.cancelled(time.perf_counter() - requested_at)

    def _drop_all(self) -> None:
        """Fail all requests. `Unavailable`, not `Cancelled`: the client did not cancel them."""
        for request in list(self._scheduler.requests):
            error = Unavailable("the engine has stopped; send the request to another replica.")
            self._runner.drop(request, "failed", error)
