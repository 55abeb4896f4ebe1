"""What being watched costs: ``python -m tests.benchmarks.observability``.

One engine paints the same pictures again and again, watched in one way after the other, in an order
that is drawn for each round. A way's throughput is compared with that of ``nothing`` in the same
round, for machines drift; the median of these ratios is the result. Small pictures, one at a time,
are the worst case: nearly nothing is painted for each call that is counted. Processor time is
compared as well, which other programs on the machine disturb less.

Traces are begun and ended on the engine's own thread, and sent from its process to a collector that
decodes them: in a served application that is all up to the gateway, in another process.

Then what the gateway does with a request and with a scrape, per piece.
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
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from starlette.types import Receive, Scope, Send

from serve_app.config.models import AppConfig, EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.metrics import EngineMetrics
from serve_app.engine.model.loader import LoadedPipeline
from serve_app.engine.request import EventCallback
from serve_app.gateway.exposition import exposition
from serve_app.gateway.requests_log import RequestLog, RequestRecord, record_of
from serve_app.gateway.schemas import Timings
from serve_app.gateway.tracing import Tracing
from serve_app.metrics.export import Report, report
from serve_app.protocol.events import Completed, Event, Step, Timeline
from serve_app.protocol.params import INITIAL, GenerationParams, RequestContext
from tests.benchmarks.engine import hardware

LEAST = 0.98
"""Of the throughput without: what the project promises."""

SCRAPE_EVERY_S = 1.0
"""Fifteen times as often as Prometheus does."""

Way = Callable[[Engine], AbstractContextManager[None]]


@contextmanager
def _nothing(engine: Engine) -> Iterator[None]:
    """A meter that measures nothing in place of the engine's."""
    names = (name for name in dir(EngineMetrics) if not name.startswith("_"))
    silent: Any = SimpleNamespace(**dict.fromkeys(names, lambda *_: None))
    kept, engine._metrics = engine._metrics, silent
    try:
        yield
    finally:
        engine._metrics = kept


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
"""Each is a context in which the engine is watched so; the first is what others are compared to."""


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
        record = RequestRecord("an-id", pictures=(params.resolved(engine.info),))
        trace = tracing.begin(SCOPE, record)

        def hear(event: Event) -> None:
            if isinstance(event, Timeline):
                record.timelines[params.seed] = event
            if isinstance(event, Completed):
                timeline = record.timelines[params.seed]
                parts_s = (*timeline.parts_s, event.result.timings.decode_s)
                record.timelines[params.seed] = replace(timeline, parts_s=parts_s)
                trace.end()
            on_event(event)

        return submit(params, hear, replace(context, trace=record.traceparent))

    watched: Any = engine
    watched.submit = traced
    try:
        yield
    finally:
        del watched.submit


@contextmanager
def _tracing() -> Iterator[Tracing]:
    """To a collector that is a process of its own."""
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
            collector.communicate()  # which ends it


@dataclass(frozen=True)
class Load:
    """Pictures of one block."""

    name: str
    pictures: int
    at_once: bool
    blocks: int
    """In a round, for each way: short ones, for the machine drifts from one to the next."""
    steps: int = 20


LOADS = (Load("one at a time", 1, False, 6), Load("sixteen at once", 16, True, 3))


@dataclass(frozen=True)
class Row:
    """One way under one load."""

    load: str
    way: str
    images_per_s: float
    """Median of the rounds."""
    throughput: float
    """As a share of that with nothing: the median of the rounds' ratios."""
    between: tuple[float, float]
    """The true median lies there with 95 % certainty, whatever the noise is like."""
    processor: float
    """The same for processor time a picture; under 1 is less."""


def median_between(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of a median: those two values between which half of all that
    could have been drawn begins, by the binomial distribution's normal approximation (Conover,
    1999, "Practical nonparametric statistics")."""
    ordered, count = sorted(values), len(values)
    within = 1.96 * math.sqrt(count) / 2
    low, high = math.floor(count / 2 - within), math.ceil(count / 2 + within)
    return ordered[max(0, low - 1)], ordered[min(count - 1, high)]


def _generate(engine: Engine, load: Load, way: Way) -> tuple[float, float]:
    """Wall and processor seconds of one block."""
    requests = [
        GenerationParams("a red circle", seed, num_inference_steps=load.steps)
        for seed in range(load.pictures)
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
    """Every way once in each round, after a block that does not count."""
    draw = random.Random(0)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    _generate(engine, load, ways[next(iter(ways))])
    for _ in range(rounds * load.blocks):
        for name in draw.sample(list(ways), len(ways)):
            taken[name].append(_generate(engine, load, ways[name]))
    plain = taken[next(iter(ways))]
    rows = []
    for name, blocks in taken.items():
        ratios = [without[0] / watched[0] for without, watched in zip(plain, blocks, strict=True)]
        processor = [
            watched[1] / without[1] for without, watched in zip(plain, blocks, strict=True)
        ]
        rows.append(
            Row(
                load.name,
                name,
                load.pictures / statistics.median(wall_s for wall_s, _ in blocks),
                statistics.median(ratios),
                median_between(ratios),
                statistics.median(processor),
            )
        )
    return rows


@dataclass(frozen=True)
class Metering:
    """What the engine's thread does for its metrics at each denoiser call; medians."""

    seconds: float
    call_s: float
    """Of the call itself, for one small picture."""

    @property
    def share(self) -> float:
        return self.seconds / self.call_s


def metering_of(engine: Engine) -> Metering:
    """Measured beside the calls, one after each, so that the machine is as busy for both."""
    meter, spent, calls = EngineMetrics("observed"), [], []
    kept = engine._metrics.called

    def called(size: tuple[int, int], batch_size: int, seconds: float) -> None:
        calls.append(seconds)
        started_at = time.perf_counter()
        meter.paused(0.001)
        meter.called(size, batch_size, seconds)
        spent.append(time.perf_counter() - started_at)

    engine._metrics.called = called  # type: ignore[method-assign]
    try:
        engine.generate(GenerationParams("a red circle", 1, num_inference_steps=100))
    finally:
        engine._metrics.called = kept  # type: ignore[method-assign]
    return Metering(statistics.median(spent), statistics.median(calls))


def _median_s(do: Callable[[], object], times: int = 30) -> float:
    taken = []
    for _ in range(times):
        started_at = time.perf_counter()
        do()
        taken.append(time.perf_counter() - started_at)
    return statistics.median(taken)


def request_s(tracing: Tracing | None = None, times: int = 2_000) -> float:
    """What keeping a record adds to a request in the gateway, its log line's handlers apart.

    With the trace of one picture in twenty steps, if it is traced.
    """
    image = GenerationParams("a red circle", 1, width=64, height=64, num_inference_steps=20)
    steps = tuple(Step(0.01 * number, 16) for number in range(20))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        record = record_of(scope)
        if record.sampled:
            record.images = (image,)
            record.timelines[image.seed] = Timeline((0.0, 0.0, 0.2, 0.0), steps)
        record.timings = Timings.of((0.0, 0.0, 1.0, 0.0, 0.0))
        record.complete()

    async def all_of_them() -> float:
        watched = app if tracing is None else tracing.middleware(app)
        recorder: Any = RequestLog(watched, "observed", ["/v1/images/generations"])
        waited: Any = None
        started_at = time.perf_counter()
        for _ in range(times):
            await recorder(dict(SCOPE), waited, waited)
        return (time.perf_counter() - started_at) / times

    return asyncio.run(all_of_them())


def exposition_s(replicas: int) -> tuple[float, int]:
    """Rendering what so many replicas said, and the bytes of it."""
    families = report("engine", "a").families
    reports = [Report(f"replica{index}", families) for index in range(replicas)]
    text, _ = exposition(reports, "")
    return _median_s(partial(exposition, reports, ""), 5), len(text)


def _shown(rows: Sequence[Row]) -> str:
    lines = [
        "| pictures | watched by | pictures/s | throughput (95 % certain) | processor time |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.load} | {row.way} | {row.images_per_s:.2f} | {row.throughput:.2%} "
        f"({row.between[0]:.2%} to {row.between[1]:.2%}) | {row.processor:.2%} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(
    rounds: Annotated[int, typer.Option(min=3, help="Each has every way once.")] = 25,
    out: Annotated[Path | None, typer.Option(help="File for the figures, as JSON.")] = None,
) -> None:
    """Compare the ways with the bundled model on the CPU."""
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
        figures = {
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
        out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
