"""Two ways to serve a trace of arrivals with one pipeline: the stock pipeline and the engine."""

import itertools
import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.scheduling.queue import RankedPolicy
from serve_app.protocol.events import Completed, Event, Failed
from serve_app.protocol.params import GenerationParams
from tests.benchmarks.efficiency import BareCalls, busy_s
from tools.demo_model.scenes import COLORS, SHAPES

PROMPTS = [
    f"a {color} {shape} on a {background} background"
    for background, shape, color in itertools.product(COLORS, SHAPES, COLORS)
]
"""Different prompts of one length, so that a cache of prompts is no advantage."""


@dataclass(frozen=True)
class Kind:
    """Requests of one size and step count."""

    width: int
    height: int
    steps: int
    share: float

    def params(self, seed: int) -> GenerationParams:
        return GenerationParams(
            prompt=PROMPTS[seed % len(PROMPTS)],
            seed=seed,
            width=self.width,
            height=self.height,
            num_inference_steps=self.steps,
        )


@dataclass(frozen=True)
class Arrival:
    """A request that is due ``at_s`` after the start of the trace."""

    at_s: float
    kind: Kind
    seed: int


@dataclass(frozen=True)
class Outcome:
    """Outcome of one request; ``latency_s`` is None if it failed."""

    kind: Kind
    latency_s: float | None


@dataclass(frozen=True)
class EngineReport:
    """Statistics of an engine, and the time of its network calls without it."""

    mean_batch_size: float
    caps: dict[str, int]
    """Largest batch that pays, by size."""
    forecast_error: float | None
    """Median relative error of the predicted finish times."""
    busy_s: float
    """Time with at least one request in the engine."""
    bare_s: dict[str, float]
    """Seconds of the calls on their own, at the same batch sizes, by network."""

    @property
    def efficiency(self) -> float:
        return sum(self.bare_s.values()) / self.busy_s


@dataclass(frozen=True)
class Served:
    """Outcomes of a trace of arrivals."""

    outcomes: list[Outcome]
    """Outcomes in the order of the arrivals."""
    images: dict[int, Tensor] = field(default_factory=dict)
    """Images by seed, if they are kept."""
    report: EngineReport | None = None
    """Report of the engine; None for the stock ways."""


Way = Callable[[list[Arrival]], Served]


def trace(kinds: list[Kind], rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Draw Poisson arrivals at ``rate`` per second."""
    rng = Random(seed)
    arrivals: list[Arrival] = []
    at_s = rng.expovariate(rate)
    while at_s < seconds:
        [kind] = rng.choices(kinds, [kind.share for kind in kinds])
        arrivals.append(Arrival(at_s, kind, len(arrivals)))
        at_s += rng.expovariate(rate)
    return arrivals


def _replay(arrivals: list[Arrival], send: Callable[[int, Arrival], None]) -> float:
    """Send each arrival when it is due; return the start of the trace by `time.perf_counter`."""
    pause = threading.Event()
    started_at = time.perf_counter()
    for number, arrival in enumerate(arrivals):
        pause.wait(max(0.0, started_at + arrival.at_s - time.perf_counter()))
        send(number, arrival)
    return started_at


def _outcomes(
    arrivals: list[Arrival], started_at: float, ended_at: list[float | None]
) -> list[Outcome]:
    return [
        Outcome(arrival.kind, None if end is None else end - started_at - arrival.at_s)
        for arrival, end in zip(arrivals, ended_at, strict=True)
    ]


def with_stock_pipeline(pipeline: LoadedPipeline, max_batch: int) -> Way:
    """Serve whole requests: the oldest, with others of its kind, up to ``max_batch``."""

    def serve(arrivals: list[Arrival]) -> Served:
        inbox: queue.SimpleQueue[tuple[int, Arrival] | None] = queue.SimpleQueue()
        ended_at: list[float | None] = [None] * len(arrivals)

        def work() -> None:
            waiting: list[tuple[int, Arrival]] = []
            more = True
            while more or waiting:
                while more and (not waiting or not inbox.empty()):
                    item = inbox.get()
                    if item is None:
                        more = False
                    else:
                        waiting.append(item)
                if not waiting:
                    continue
                kind = waiting[0][1].kind
                batch = [item for item in waiting if item[1].kind == kind][:max_batch]
                waiting = [item for item in waiting if item not in batch]
                generate(batch)

        def generate(batch: list[tuple[int, Arrival]]) -> None:
            """Halve a batch that does not fit into memory; a single request then fails."""
            try:
                generate_whole(pipeline, [arrival for _, arrival in batch])
            except RuntimeError:
                half = len(batch) // 2
                for part in (batch[:half], batch[half:]) if half else ():
                    generate(part)
                return
            for number, _ in batch:
                ended_at[number] = time.perf_counter()

        worker = threading.Thread(target=work)
        worker.start()
        started_at = _replay(arrivals, lambda number, arrival: inbox.put((number, arrival)))
        inbox.put(None)
        worker.join()
        return Served(_outcomes(arrivals, started_at, ended_at))

    return serve


def generate_whole(pipeline: LoadedPipeline, batch: list[Arrival]) -> None:
    """Call the stock pipeline on a list of prompts."""
    params = [arrival.kind.params(arrival.seed) for arrival in batch]
    pipeline.stock.set_progress_bar_config(disable=True)
    images = pipeline.stock(
        prompt=[one.prompt for one in params],
        width=params[0].width,
        height=params[0].height,
        num_inference_steps=params[0].num_inference_steps,
        generator=[torch.Generator("cpu").manual_seed(one.seed) for one in params],
        output_type="pt",
    ).images
    images.cpu()


def with_engine(
    pipeline: LoadedPipeline,
    model: ModelConfig,
    config: EngineConfig,
    keep_images: bool = False,
    policy: Callable[[], RankedPolicy] | None = None,
) -> Way:
    """Serve each trace with a new engine that rejects no request, as the other ways do not.

    ``policy`` replaces the configured one.
    """
    config = config.model_copy(update={"max_backlog_s": math.inf})

    def serve(arrivals: list[Arrival]) -> Served:
        sent_at = [0.0] * len(arrivals)
        ended_at: list[float | None] = [None] * len(arrivals)
        spans: list[tuple[float, float]] = []
        images: dict[int, Tensor] = {}
        ends: queue.SimpleQueue[tuple[int, Completed | Failed]] = queue.SimpleQueue()

        def collect() -> None:
            for _ in arrivals:
                number, event = ends.get()
                if isinstance(event, Completed):
                    pixels = event.result.pixels.cpu()  # copied, not only queued on the device
                    ended_at[number] = time.perf_counter()
                    if keep_images:
                        images[arrivals[number].seed] = pixels
                spans.append((sent_at[number], time.perf_counter()))

        calls = BareCalls(pipeline)
        with Engine(pipeline, model, config, policy and policy()) as engine, calls.noted():

            def send(number: int, arrival: Arrival) -> None:
                def on_event(event: Event) -> None:
                    if isinstance(event, Completed | Failed):
                        ends.put((number, event))

                sent_at[number] = time.perf_counter()
                engine.submit(arrival.kind.params(arrival.seed), on_event)

            collector = threading.Thread(target=collect)
            collector.start()
            started_at = _replay(arrivals, send)
            collector.join()
        caps = {f"{width}x{height}": cap for (width, height), cap in engine.cost.caps.items()}
        report = EngineReport(
            mean_batch_size=engine.stats().mean_batch_size,
            caps=caps,
            forecast_error=engine.stats().forecast_error,
            busy_s=busy_s(spans),
            bare_s=calls.seconds(),
        )
        return Served(_outcomes(arrivals, started_at, ended_at), images, report)

    return serve
