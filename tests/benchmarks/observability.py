"""Measure the cost of metrics and traces: ``python -m tests.benchmarks.observability``.

One engine generates the same images again and again, observed in each way once a round, in random
order. A way's throughput is compared with that of ``nothing`` in the same round, because machines
drift. The result is the median of these ratios. Small images one at a time are the worst case: the
calls that are counted are the shortest. Processor time is compared too; other programs on the
machine disturb it less.

Traces begin and end on the engine's own thread, and its process sends them to a collector. In a
served application, the gateway does all of that, in another process.

The gateway's work for one request and for one scrape is measured separately.
"""

import asyncio
import json
import math
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from starlette.types import Receive, Scope, Send

from serve_app.config.models import AppConfig, EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.metrics import EngineMetrics
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.request import EventCallback
from serve_app.gateway.exposition import exposition
from serve_app.gateway.requests_log import RequestLog, RequestRecord, record_of
from serve_app.gateway.schemas import Timings
from serve_app.gateway.tracing import Tracing
from serve_app.metrics.export import Report, report
from serve_app.protocol.events import Completed, DenoiserCalls, Event, Step, Timeline
from serve_app.protocol.params import INITIAL, GenerationParams, RequestContext
from tests.benchmarks.engine import hardware

LEAST = 0.98
"""Least share of the throughput without observation: the project's target."""

SCRAPE_EVERY_S = 1.0
"""Interval of scrapes, a fifteenth of Prometheus' usual one."""

Way = Callable[[Engine], AbstractContextManager[None]]


@contextmanager
def _nothing(engine: Engine) -> Iterator[None]:
    """Silence the metrics of the engine."""
    names = [name for name in dir(EngineMetrics) if not name.startswith("_")]
    vars(engine.metrics).update(dict.fromkeys(names, lambda *_: None))
    try:
        yield
    finally:
        for name in names:
            del vars(engine.metrics)[name]


@contextmanager
def _metrics(engine: Engine) -> Iterator[None]:
    yield


@contextmanager
def _scraped(engine: Engine) -> Iterator[None]:
    stop = threading.Event()

    def scrape() -> None:
        report("engine", "a")
        while not stop.wait(SCRAPE_EVERY_S):
            report("engine", "a")

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


WAYS: dict[str, Way] = {
    "nothing": _nothing,
    "metrics": _metrics,
    "metrics, scraped every second": _scraped,
}
"""Contexts in which the engine is observed; the first one is the reference."""


SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/v1/images/generations",
    "headers": [(b"x-request-id", b"an-id"), (b"user-agent", b"a client")],
}


@contextmanager
def _traced(tracing: Tracing, engine: Engine) -> Iterator[None]:
    submit = engine.submit

    def traced(
        params: GenerationParams, on_event: EventCallback, context: RequestContext = INITIAL
    ) -> int:
        record = RequestRecord("an-id", images=(params.resolved(engine.info),))
        trace = tracing.begin(SCOPE, record)

        def on_any_event(event: Event) -> None:
            if isinstance(event, Timeline):
                record.timelines[params.seed] = event
            if isinstance(event, Completed):
                timeline = record.timelines[params.seed]
                parts_s = (*timeline.parts_s, event.result.timings.decode_s)
                record.timelines[params.seed] = replace(timeline, parts_s=parts_s)
                trace.end()
            on_event(event)

        return submit(params, on_any_event, replace(context, trace=record.traceparent))

    observed: Any = engine
    observed.submit = traced
    try:
        yield
    finally:
        del observed.submit


@contextmanager
def _tracing() -> Iterator[Tracing]:
    """Trace to a collector in a process of its own."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.collector"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as collector:
        assert collector.stdout is not None
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector.stdout.readline().strip()
        tracing = Tracing.to_collector(AppConfig(), "benchmark")
        try:
            yield tracing
        finally:
            tracing.close()
            collector.communicate()  # the end of its input ends it


@dataclass(frozen=True)
class Load:
    """The images of one block."""

    name: str
    images: int
    at_once: bool
    blocks: int
    """Blocks in a round for each way. They are short, because the machine drifts."""
    steps: int = 20


LOADS = (Load("one at a time", 1, False, 6), Load("sixteen at once", 16, True, 3))


@dataclass(frozen=True)
class Row:
    """One way under one load."""

    load: str
    way: str
    images_per_s: float
    """Median over the rounds."""
    throughput: float
    """Median of the rounds' ratios to the throughput with ``nothing``."""
    between: tuple[float, float]
    """95 % confidence interval of that median, for any distribution of the noise."""
    processor: float
    """Median of the ratios of processor time per image; less than 1 is less time."""


def median_between(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of a median.

    Its limits are two of the values, by the normal approximation of the binomial distribution
    (Conover, 1999, "Practical nonparametric statistics").
    """
    ordered, count = sorted(values), len(values)
    within = 1.96 * math.sqrt(count) / 2
    low, high = math.floor(count / 2 - within), math.ceil(count / 2 + within)
    return ordered[max(0, low - 1)], ordered[min(count - 1, high)]


def _generate(engine: Engine, load: Load, way: Way) -> tuple[float, float]:
    """Return the wall and processor seconds of one block."""
    requests = [
        GenerationParams("a red circle", seed, num_inference_steps=load.steps)
        for seed in range(load.images)
    ]
    with way(engine):
        started, spent = time.perf_counter(), time.process_time()
        if load.at_once:
            for stream in [engine.stream(request) for request in requests]:
                list(stream)
        else:
            for request in requests:
                engine.generate(request)
        return time.perf_counter() - started, time.process_time() - spent


def compare(engine: Engine, load: Load, rounds: int, ways: dict[str, Way]) -> list[Row]:
    """Measure every way once a round, after a block that does not count."""
    draw = random.Random(0)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    _generate(engine, load, ways[next(iter(ways))])
    for _ in range(rounds * load.blocks):
        for name in draw.sample(list(ways), len(ways)):
            taken[name].append(_generate(engine, load, ways[name]))
    plain = taken[next(iter(ways))]
    rows = []
    for name, blocks in taken.items():
        ratios = [without[0] / observed[0] for without, observed in zip(plain, blocks, strict=True)]
        processor = [
            observed[1] / without[1] for without, observed in zip(plain, blocks, strict=True)
        ]
        rows.append(
            Row(
                load.name,
                name,
                load.images / statistics.median(wall_s for wall_s, _ in blocks),
                statistics.median(ratios),
                median_between(ratios),
                statistics.median(processor),
            )
        )
    return rows


@dataclass(frozen=True)
class Metering:
    """Median time of the engine's thread for its metrics at a denoiser call."""

    seconds: float
    call_s: float
    """Median time of the call itself, for one small image."""

    @property
    def share(self) -> float:
        return self.seconds / self.call_s


def metering_of(engine: Engine) -> Metering:
    """Measure both after each call in turn, so that the machine is equally busy for both."""
    meter, spent, calls = EngineMetrics("observed"), [], []
    kept = engine.metrics.called

    def called(size: tuple[int, int], batch_size: int, seconds: float) -> None:
        calls.append(seconds)
        started_at = time.perf_counter()
        meter.paused(0.001)
        meter.called(size, batch_size, seconds)
        spent.append(time.perf_counter() - started_at)

    engine.metrics.called = called  # type: ignore[method-assign]
    try:
        engine.generate(GenerationParams("a red circle", 1, num_inference_steps=100))
    finally:
        engine.metrics.called = kept  # type: ignore[method-assign]
    return Metering(statistics.median(spent), statistics.median(calls))


def _median_s(do: Callable[[], object], times: int = 30) -> float:
    taken = []
    for _ in range(times):
        started_at = time.perf_counter()
        do()
        taken.append(time.perf_counter() - started_at)
    return statistics.median(taken)


def request_s(tracing: Tracing | None = None, times: int = 2_000) -> float:
    """Return the time that a request's record takes in the gateway, without the log's handlers.

    With ``tracing``, it includes the trace of one image of twenty steps.
    """
    image = GenerationParams("a red circle", 1, width=64, height=64, num_inference_steps=20)
    steps = tuple(Step(0.01 * number, 16) for number in range(20))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        record = record_of(scope)
        if record.sampled:
            record.images = (image,)
            record.timelines[image.seed] = Timeline((0.0, 0.0, 0.2, 0.0), steps)
        record.timings = Timings.of((0.0, 0.0, 1.0, 0.0, 0.0), DenoiserCalls())
        record.complete()

    async def mean_s() -> float:
        watched = app if tracing is None else tracing.middleware(app)
        recorder: Any = RequestLog(watched, ["observed"], ["/v1/images/generations"])
        waited: Any = None
        started_at = time.perf_counter()
        for _ in range(times):
            await recorder(dict(SCOPE), waited, waited)
        return (time.perf_counter() - started_at) / times

    return asyncio.run(mean_s())


def exposition_s(replicas: int) -> tuple[float, int]:
    """Return the time to render the metrics of so many replicas, and their length."""
    families = report("engine", "a").families
    reports = [Report(f"replica{index}", families) for index in range(replicas)]
    text, _ = exposition(reports, "")
    return _median_s(partial(exposition, reports, ""), 5), len(text)


def _shown(rows: Sequence[Row]) -> str:
    lines = [
        "| images | observed by | images/s | throughput (95 % certain) | processor time |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.load} | {row.way} | {row.images_per_s:.2f} | {row.throughput:.2%} "
        f"({row.between[0]:.2%} to {row.between[1]:.2%}) | {row.processor:.2%} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(
    rounds: Annotated[int, typer.Option(min=3, help="Rounds; each has every way once.")] = 25,
    out: Annotated[Path | None, typer.Option(help="File for the results, as JSON.")] = None,
) -> None:
    """Compare the ways with the demo model on the CPU."""
    model = ModelConfig(id="demo", device="cpu")
    config = EngineConfig(scheduling="fifo", max_backlog_s=1e6)
    with Engine(LoadedPipeline.load(model), model, config) as engine, _tracing() as tracing:
        metering = metering_of(engine)
        ways = WAYS | {"metrics and traces": partial(_traced, tracing)}
        rows = [row for load in LOADS for row in compare(engine, load, rounds, ways)]
        reporting_s = _median_s(partial(report, "engine", "a"))
        traced_s = request_s(tracing)
    rendering = {replicas: exposition_s(replicas) for replicas in (1, 10, 100)}
    record_s = request_s()
    print(_shown(rows))
    print(
        f"metering a denoiser call: {1e6 * metering.seconds:.1f} us, {metering.share:.2%} of the "
        f"{1000 * metering.call_s:.1f} ms that it takes"
    )
    print(f"a replica's report: {1000 * reporting_s:.2f} ms")
    for replicas, (seconds, size) in rendering.items():
        print(f"the text of {replicas} replicas: {1000 * seconds:.1f} ms, {size / 1024:.0f} KiB")
    print(f"a record of a request in the gateway: {1e6 * record_s:.0f} us")
    print(f"the same with its trace: {1e6 * traced_s:.0f} us")
    worst = min(row.throughput for row in rows)
    print(f"at least {LEAST:.0%} of the throughput: {'met' if worst >= LEAST else 'missed'}")
    if out is not None:
        results = {
            "command": f"python -m tests.benchmarks.observability --rounds {rounds}",
            "hardware": hardware(torch.device("cpu")),
            "rows": [asdict(row) for row in rows],
            "metering": asdict(metering),
            "report_s": reporting_s,
            "exposition": {
                str(replicas): {"seconds": seconds, "bytes": size}
                for replicas, (seconds, size) in rendering.items()
            },
            "record_s": record_s,
            "traced_s": traced_s,
        }
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
