"""The engine: one thread that owns the pipeline, its greenlets and the device.

Other threads send it commands through a queue, and receive events. `Scheduler` chooses what runs,
`Executor` runs it, and `Runner` advances the jobs of the requests. An error in any of them, or in a
command, is a bug: it ends the engine, all requests fail, and Serve replaces the replica.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable

import torch

from serve_app.config.gateway import Safety
from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.admission import AdmissionControl
from serve_app.engine.device import gpu_uuid, memory_reader
from serve_app.engine.executor import Executor
from serve_app.engine.lifetime import Lifetime
from serve_app.engine.loras.on_demand import LorasOnDemand, new_on_demand
from serve_app.engine.loras.source import AdapterFile
from serve_app.engine.metrics import EngineMetrics
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.model.prompt_cache import PromptCache
from serve_app.engine.model.speed import compiled, compiling, largest_bucket
from serve_app.engine.predictor import Predictor
from serve_app.engine.receivers import EventCallback
from serve_app.engine.request import Request
from serve_app.engine.runner import Runner
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.scheduling.cost import CostModel
from serve_app.engine.scheduling.load import LoadTracker
from serve_app.engine.scheduling.policies import new_policy
from serve_app.engine.scheduling.queue import RankedPolicy
from serve_app.engine.startup.certification import Certificate
from serve_app.engine.startup.cold_start import ColdStart
from serve_app.engine.startup.report import describe_model, report_start, start_error
from serve_app.engine.startup.warmup import warm_up
from serve_app.engine.stats import EngineStats, EventLog
from serve_app.engine.stream import EventStream
from serve_app.engine.watchdog import Watchdog
from serve_app.errors import Cancelled, GenerationFailed, InvalidRequest, Overloaded, Unavailable
from serve_app.protocol.events import Completed, Event, Failed, GenerationResult
from serve_app.protocol.load import ReplicaLoad
from serve_app.protocol.params import INITIAL, GenerationParams, ModelInfo, RequestContext


class Engine:
    """Generates many requests together, step by step, with one stock pipeline on one device.

    Any thread may call the public methods. `generate` and `close` wait for the engine's thread, so
    an event callback must not call them. The engine is a context manager: at the end of its block
    it finishes the admitted requests, or drops them if the block raised an exception.
    """

    # Other threads read counters of the engine's thread without a lock: each is one attribute, so
    # its value is current or one step old.

    info: ModelInfo
    """Options and limits of the loaded model."""
    certificate: Certificate
    """Result of the certification: the way in which requests share the pipeline."""
    cold_start: ColdStart
    """Durations of the start, by phase."""
    cost: CostModel
    """Measured costs. Only the engine's thread changes it."""
    metrics: EngineMetrics
    """Prometheus metrics of this engine."""
    loras: LorasOnDemand | None
    """Adapters on demand, if the model has a source of them."""
    prompts: PromptCache
    """Encoded prompts of earlier requests. Only the engine's thread changes it."""

    def __init__(
        self,
        pipeline: LoadedPipeline,
        model: ModelConfig,
        config: EngineConfig | None = None,
        policy: RankedPolicy | None = None,
        cold_start: ColdStart | None = None,
        metrics: EngineMetrics | None = None,
    ) -> None:
        """Start the engine's thread, and wait until the pipeline is certified.

        ``policy`` replaces the configured one. ``cold_start`` is a stopwatch that already runs, if
        the model was loaded for this engine. The default metrics have ``model.id`` as their label.

        Raises:
            ModelLoadError: If the pipeline cannot generate an image.
            ConfigError: If the model's defaults exceed the limits, or the profile is not one.
        """
        self._model = model
        self._config = config or EngineConfig()
        self._pipeline = pipeline
        self.metrics = metrics or EngineMetrics(model.id)
        self._load_tracker = LoadTracker()
        self._log = EventLog()
        self._lifetime = Lifetime()
        self.cold_start = cold_start or ColdStart()
        self.cost = CostModel(self._config.max_batch_size)
        self.prompts = PromptCache(self._config.prompt_cache_mib * 2**20)
        self._predictor = Predictor(self.cost, self.metrics)
        self._scheduler = Scheduler(
            policy or new_policy(self._config.scheduling, self._config.slo_scale),
            self.cost,
            largest_bucket if self._model.speed.compile else None,
        )
        self._watchdog = Watchdog(self._config.stuck_after_s, self._lifetime.give_up)
        self._executor = Executor(
            pipeline, model.speed, self.cost, self._load_tracker, self.metrics, self._watchdog
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
        post, fail = self._commands.put, self._runner.fail_waiting
        self.loras = new_on_demand(pipeline, model, self._config, self.metrics, post, fail)
        self._scheduler.loras = None if self.loras is None else self.loras.cache
        threading.Thread(target=self._run, name="engine", daemon=True).start()
        self._lifetime.wait_for_start()
        if self._lifetime.cause is not None:
            raise start_error(self._lifetime.cause, model, pipeline.class_name)
        report_start(self.info, self.cold_start, self.metrics, self._config.max_running > 1)
        self.metrics.runs_on(self.info.device, gpu_uuid(pipeline.device))
        memory = memory_reader(pipeline.device)
        self.metrics.watch(self.replica_load, self._runner.count, self._watchdog.share, memory)

    @classmethod
    def load(
        cls, model: ModelConfig, config: EngineConfig | None = None, safety: Safety = "flag"
    ) -> "Engine":
        """Load a model, start an engine for it, and return when it is ready.

        ``safety`` is ``gateway.safety`` of a server: the treatment of images that the model's
        safety checker flags.

        Raises:
            ModelLoadError: If the model does not exist, or cannot be loaded.
            ConfigError: If the device cannot be used, or a setting does not fit the model.
        """
        cold_start = ColdStart()
        pipeline = LoadedPipeline.load(model, safety)
        cold_start.ended("load")
        return cls(pipeline, model, config, cold_start=cold_start)

    # ---- the engine's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        """Warm up, then loop until the engine closes or the device fails."""
        self._watchdog.start()
        try:
            # Grad mode belongs to the thread, and the pipelines' own no_grad contexts interleave.
            # Without one around them all, the last request to finish would turn gradients on.
            with torch.no_grad():
                with compiling(self._model.speed):
                    self._warm_up()
                with compiled(self._model.speed):
                    self._lifetime.start()
                    self._loop()
        except BaseException as error:
            self._lifetime.crash(error)
        finally:
            self._lifetime.close()
            try:
                # No request may wait for a thread that has ended.
                while not self._commands.empty():
                    with contextlib.suppress(Exception):
                        self._commands.get()()
                self._drop_all()
            finally:
                self._watchdog.stop()
                if self.loras is not None:
                    self.loras.close()
                self._executor.close()
                self._lifetime.end()

    def _warm_up(self) -> None:
        """Find out how requests may share the pipeline, and set up the parts that depend on it."""
        self._executor.rendezvous.on_call = self._watchdog.begin_start_up
        self.certificate, self._runner.previews, trials = warm_up(
            self._pipeline,
            self._executor.rendezvous,
            self._config,
            self._model.speed,
            self.cost,
            self.cold_start,
        )
        self._executor.rendezvous.on_call = None
        self.info = describe_model(
            self._model, self._config, self._pipeline, self.certificate, trials
        )
        self._executor.specs = self.certificate.specs
        self._predictor.batched = self.certificate.sharing == "batched"
        self._scheduler.max_running = (
            1 if self.certificate.sharing == "sequential" else self._config.max_running
        )

    def _loop(self) -> None:
        while not self._lifetime.ended and self._wait_for_work():
            self._process_commands()
            while request := self._scheduler.start_next(time.perf_counter()):
                self._runner.start(request)
            if self._scheduler.running:
                self._run_next_call()

    def _run_next_call(self) -> None:
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
            self._runner.finish_denoiser_call(request, outcome)

    # ---- commands --------------------------------------------------------------------------------

    def _wait_for_work(self) -> bool:
        """Return at once if a request can run, else wait for a command; ``False`` to end."""
        while self._scheduler.is_idle:
            self._executor.wait_idle()
            if self._lifetime.closing and self._commands.empty() and not self._scheduler.waiting:
                return False
            command = self._commands.get()
            self._executor.work_arrived()
            command()
        return True

    def _process_commands(self) -> None:
        """Run the commands that have arrived."""
        while not self._commands.empty():  # only this thread takes from it
            self._commands.get()()

    def _accept(self, request: Request) -> None:
        try:
            position = self._admission.admit(request)
        except (InvalidRequest, Overloaded) as error:
            self._runner.report(request, "rejected", Failed(error.with_traceback(None)))
        except Exception as error:
            failure = GenerationFailed(f"the engine could not admit the request: {error!r}")
            self._runner.report(request, "failed", Failed(failure))
            raise
        else:
            self._runner.report(request, "queued", position)

    def _locate(self, number: int) -> None:
        if request := self._scheduler.get(number):
            self._runner.emit(request, self._admission.locate(request))

    def _cancel(self, number: int, requested_at: float) -> None:
        if request := self._scheduler.get(number):
            self._runner.drop(request, "cancelled", Cancelled("the request was cancelled."))
            self.metrics.cancelled(time.perf_counter() - requested_at)

    def _drop_all(self) -> None:
        """Fail all requests. `Unavailable`, not `Cancelled`: the client did not cancel them."""
        self._runner.fail_all("the engine has stopped; send the request to another replica.")

    # ---- for all threads -------------------------------------------------------------------------

    def submit(
        self,
        params: GenerationParams,
        on_event: EventCallback,
        context: RequestContext = INITIAL,
        lora_files: tuple[AdapterFile, ...] | None = None,
    ) -> int:
        """Submit a request, and return its number for `cancel` and `locate`.

        ``on_event`` receives each event on a thread of the engine: it must return at once. The last
        event is `Completed` or `Failed`. Reading the image of a `Completed` raises `NotFinite` if
        the model's output is NaN or infinite. A rejected request has one event: `Failed` with
        `Overloaded`, or with `InvalidRequest` if its deadline is far too short. ``lora_files`` is
        the result of `loras.find`, which may wait for the source, and is called here without it.

        Raises:
            InvalidRequest: If a parameter is out of its range, or the model does not support it.
            Unavailable: If the engine is closing or has stopped, or the source does not answer.
        """
        resolved = params.resolved(self.info)
        self._pipeline.check_input_images(resolved)
        if lora_files is None:
            lora_files = () if self.loras is None else self.loras.find(resolved.lora)
        with self._lifetime.submission(on_event) as (number, send):
            now = time.perf_counter()
            waited_s = 0.0 if context.sent_at is None else max(0.0, time.time() - context.sent_at)
            request = Request(number, resolved, context, send, now, waited_s, lora_files)
            self._commands.put(lambda: self._accept(request))
        return number

    def cancel(self, number: int) -> None:
        """Cancel a request before its next step: its last event is `Failed` with `Cancelled`.

        A request that has ended is not affected.
        """
        self._log.note(self._executor.denoiser_calls, number, "cancel_requested")
        requested_at = time.perf_counter()
        self._commands.put(lambda: self._cancel(number, requested_at))

    def locate(self, number: int) -> None:
        """Send an event with a request's position: `Queued`, or `Progress` with ``eta_s``."""
        self._commands.put(lambda: self._locate(number))

    def generate(
        self, params: GenerationParams, on_event: EventCallback | None = None
    ) -> GenerationResult:
        """Generate one image and wait for it. ``on_event`` receives its events on this thread.

        Raises:
            InvalidRequest: If a parameter is out of its range, or the model does not support it.
            Overloaded: If too much work waits, or the deadline cannot be met.
            ContentPolicyViolation: If the safety checker flagged the image, and blocks.
            GenerationFailed: If the pipeline raised an exception, or the image is not finite.
            Unavailable: If the engine is closing or has stopped.
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

    def stream(self, params: GenerationParams) -> EventStream:
        """Submit a request and return its events. Closing the stream cancels the request.

        Raises:
            InvalidRequest: If a parameter is out of its range, or the model does not support it.
            Unavailable: If the engine is closing or has stopped.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        number = self.submit(params, events.put)
        return EventStream(events, lambda: self.cancel(number))

    def stats(self) -> EngineStats:
        """Return a snapshot of the engine's counts, which may be one step apart."""
        return EngineStats(
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running),
            denoiser_calls=self._executor.denoiser_calls,
            steps=self._executor.steps,
            forecast_error=self._predictor.error,
            log=self._log.entries,
        )

    def replica_load(self) -> ReplicaLoad:
        """Return the load that the scaling policy reads. Takes microseconds."""
        return self._load_tracker.load(time.perf_counter())

    def check(self) -> None:
        """Raise `Unavailable` if the engine has stopped, or if its thread is stuck in a call."""
        if self._lifetime.ended:
            raise Unavailable(f"the engine has stopped: {self._lifetime.cause!r}")

    def wait_for_loss(self) -> bool:
        """Wait until the engine ends; return False if it was closed, and True if it failed."""
        self._lifetime.wait_for_end()
        return self._lifetime.cause is not None

    def close(self, drain: bool = True) -> None:
        """Reject new requests, and end the engine's thread when the admitted ones have ended.

        Without ``drain`` they fail with `Unavailable` instead.
        """
        self._lifetime.close()
        if not drain:
            self._commands.put(self._drop_all)
        self._commands.put(lambda: None)  # wakes an idle thread
        self._lifetime.wait_for_end()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(drain=kind is None)
