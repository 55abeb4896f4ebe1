"""What sharing steps and ordering by deadlines is worth: ``python -m tests.benchmarks.engine``.

One run compares four ways to serve one trace of arrivals with one pipeline on one device:

- ``one at a time``: the stock pipeline, first come first served,
- ``whole batches``: the stock pipeline on a list of prompts, whenever the next in line are alike,
- ``engine, fifo`` and ``engine, on_time``: this engine with two of its policies.

Latency counts from the moment at which a request was due, however late it was sent. A request
that fails or takes longer than ``slo_scale`` times its time alone misses its deadline. The mix of
sizes and steps is that of vLLM-Omni's benchmark, scaled to the model's native size.
"""

import json
import os
import platform
import queue
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer

from serve_app.config import EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.events import Completed, Event, Failed
from serve_app.engine.params import GenerationParams
from serve_app.engine.pipeline import LoadedPipeline

MIX = ((0.5, 20, 15), (0.75, 20, 25), (1.0, 25, 45), (1.5, 35, 15))
"""(side as a share of the native one, steps, share in percent)"""

MAX_BATCH = 16

DEFAULT_LOAD = 1.5
"""Steps that are shared make more pictures a second than one at a time: less is no test."""


@dataclass(frozen=True)
class Kind:
    """Requests of one size and step count."""

    width: int
    height: int
    steps: int
    share: float

    def params(self, seed: int) -> GenerationParams:
        return GenerationParams(
            prompt="a red circle on a blue background",
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
    """``latency_s`` is none if it failed."""

    kind: Kind
    latency_s: float | None


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    load: float
    way: str
    images_per_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    short_p95_s: float
    """Of the quickest kind."""
    slo: float
    """Share that met its deadline."""


Way = Callable[[list[Arrival]], list[Outcome]]


def kinds(pipeline: LoadedPipeline) -> list[Kind]:
    def side(native: int, scale: float) -> int:
        multiple = pipeline.size_multiple
        return max(multiple, round(native * scale / multiple) * multiple)

    width, height = pipeline.default_size_px
    return [
        Kind(side(width, scale), side(height, scale), steps, share / 100)
        for scale, steps, share in MIX
    ]


def seconds_alone(pipeline: LoadedPipeline, kind: Kind, repeats: int = 5) -> float:
    """Median time of the stock pipeline for one picture; the first, which warms up, is left out."""
    taken = []
    for seed in range(repeats + 1):
        started_at = time.perf_counter()
        pipeline.paint(kind.params(seed)).cpu()
        taken.append(time.perf_counter() - started_at)
    return statistics.median(taken[1:])


def measure_alone(pipeline: LoadedPipeline, mix: list[Kind]) -> tuple[dict[Kind, float], float]:
    """Seconds of each kind alone, and what one at a time can do of the mix, in images a second."""
    alone_s = {kind: seconds_alone(pipeline, kind) for kind in mix}
    return alone_s, 1 / sum(kind.share * alone_s[kind] for kind in mix)


def trace(kinds: list[Kind], rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Poisson arrivals, ``rate`` a second."""
    rng = Random(seed)
    arrivals: list[Arrival] = []
    at_s = rng.expovariate(rate)
    while at_s < seconds:
        [kind] = rng.choices(kinds, [kind.share for kind in kinds])
        arrivals.append(Arrival(at_s, kind, len(arrivals)))
        at_s += rng.expovariate(rate)
    return arrivals


def _replay(arrivals: list[Arrival], send: Callable[[int, Arrival], None]) -> float:
    """Send each when it is due; when the first was due, by `time.perf_counter`."""
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
    """Whole requests: the oldest, with up to ``max_batch`` of its kind."""

    def serve(arrivals: list[Arrival]) -> list[Outcome]:
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
                paint_whole(pipeline, [arrival for _, arrival in batch])
                for number, _ in batch:
                    ended_at[number] = time.perf_counter()

        worker = threading.Thread(target=work)
        worker.start()
        started_at = _replay(arrivals, lambda number, arrival: inbox.put((number, arrival)))
        inbox.put(None)
        worker.join()
        return _outcomes(arrivals, started_at, ended_at)

    return serve


def paint_whole(pipeline: LoadedPipeline, batch: list[Arrival]) -> None:
    """The stock call, on a list of prompts."""
    params = [arrival.kind.params(arrival.seed) for arrival in batch]
    pipeline._pipeline.set_progress_bar_config(disable=True)
    images = pipeline._pipeline(
        prompt=[one.prompt for one in params],
        width=params[0].width,
        height=params[0].height,
        num_inference_steps=params[0].num_inference_steps,
        generator=[torch.Generator("cpu").manual_seed(one.seed) for one in params],
        output_type="pt",
    ).images
    images.cpu()


def with_engine(
    pipeline: LoadedPipeline, model: ModelConfig, config: EngineConfig, notes: dict[str, Any]
) -> Way:
    def serve(arrivals: list[Arrival]) -> list[Outcome]:
        ended_at: list[float | None] = [None] * len(arrivals)
        ends: queue.SimpleQueue[tuple[int, Completed | Failed]] = queue.SimpleQueue()

        def collect() -> None:
            for _ in arrivals:
                number, event = ends.get()
                if isinstance(event, Completed):
                    event.result.pixels.cpu()  # in hand, not only asked for
                    ended_at[number] = time.perf_counter()

        with Engine(pipeline, model, config) as engine:

            def send(number: int, arrival: Arrival) -> None:
                def on_event(event: Event) -> None:
                    if isinstance(event, Completed | Failed):
                        ends.put((number, event))

                engine.submit(arrival.kind.params(arrival.seed), on_event)

            collector = threading.Thread(target=collect)
            collector.start()
            started_at = _replay(arrivals, send)
            collector.join()
            notes[config.scheduling] = {
                "mean_batch_size": engine.stats().mean_batch_size,
                "caps": {
                    f"{width}x{height}": cap for (width, height), cap in engine._cost.caps.items()
                },
            }
        return _outcomes(arrivals, started_at, ended_at)

    return serve


def summary(
    load: float, way: str, outcomes: list[Outcome], took_s: float, slo_s: dict[Kind, float]
) -> Row:
    done = sorted(outcome.latency_s for outcome in outcomes if outcome.latency_s is not None)
    shortest = min(slo_s, key=lambda kind: slo_s[kind])
    short = sorted(
        outcome.latency_s
        for outcome in outcomes
        if outcome.latency_s is not None and outcome.kind == shortest
    )

    def percentile(values: list[float], share: float) -> float:
        return values[min(len(values) - 1, int(share * len(values)))] if values else float("nan")

    met = sum(
        outcome.latency_s is not None and outcome.latency_s <= slo_s[outcome.kind]
        for outcome in outcomes
    )
    return Row(
        load=load,
        way=way,
        images_per_s=len(done) / took_s,
        p50_s=percentile(done, 0.50),
        p95_s=percentile(done, 0.95),
        p99_s=percentile(done, 0.99),
        short_p95_s=percentile(short, 0.95),
        slo=met / len(outcomes),
    )


def hardware(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    if device.type == "cpu":
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "name" in line]
        name = models[0].split(":")[1].strip() if models else name
    return {
        "device": name,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "diffusers", "diffusion-serve")},
    }


def show(rows: list[Row]) -> str:
    header = f"{'load':>5} {'':<16} {'images/s':>8} {'p50 s':>7} {'p95 s':>7} {'p99 s':>7}"
    lines = [f"{header} {'short p95 s':>11} {'in time':>8}"]
    lines += [
        f"{row.load:>5.2f} {row.way:<16} {row.images_per_s:>8.2f} {row.p50_s:>7.2f} "
        f"{row.p95_s:>7.2f} {row.p99_s:>7.2f} {row.short_p95_s:>11.2f} {row.slo:>8.0%}"
        for row in rows
    ]
    return "\n".join(lines)


def main(
    model: Annotated[str, typer.Option(help="'demo', or a folder in the diffusers format.")] = (
        "demo"
    ),
    device: Annotated[str, typer.Option(help="'cpu' or 'cuda'.")] = "cpu",
    load: Annotated[
        list[float] | None,
        typer.Option(help="Arrivals as a share of what one at a time can do; may be repeated."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Of arrivals, for each way and load.")] = 40.0,
    slo_scale: float = 3.0,
    threads: Annotated[
        int, typer.Option(help="Of torch on a CPU. The demo model's calls gain nothing from more.")
    ] = 1,
    seed: int = 0,
    output: Annotated[Path | None, typer.Option(help="Write the figures here, as JSON.")] = None,
) -> None:
    """Print the table."""
    model_config = ModelConfig.model_validate(
        {"id": "demo", "device": device}
        if model == "demo"
        else {"id": Path(model).name, "path": str(Path(model).absolute()), "device": device}
    )
    torch.set_num_threads(threads)
    pipeline = LoadedPipeline.load(model_config)
    mix = kinds(pipeline)
    alone_s, capacity = measure_alone(pipeline, mix)
    slo_s = {kind: slo_scale * seconds for kind, seconds in alone_s.items()}
    typer.echo(f"one at a time: {capacity:.2f} images/s on this mix")
    for kind in mix:
        typer.echo(
            f"  {kind.width}x{kind.height}, {kind.steps} steps, {kind.share:.0%}: "
            f"{alone_s[kind]:.2f} s alone"
        )

    notes: dict[str, Any] = {}

    def engine_with(scheduling: str) -> Way:
        config = EngineConfig.model_validate(
            {
                "scheduling": scheduling,
                "slo_scale": slo_scale,
                "max_batch_size": MAX_BATCH,
                "max_running": 256,
                "warmup_sizes_px": [(kind.width, kind.height) for kind in mix],
            }
        )
        return with_engine(pipeline, model_config, config, notes)

    ways = {
        "one at a time": with_stock_pipeline(pipeline, 1),
        "whole batches": with_stock_pipeline(pipeline, MAX_BATCH),
        "engine, fifo": engine_with("fifo"),
        "engine, on_time": engine_with("on_time"),
    }
    rows = []
    for share in load or [DEFAULT_LOAD]:
        arrivals = trace(mix, share * capacity, seconds, seed)
        for way, serve in ways.items():
            outcomes = serve(arrivals)
            took_s = max(
                arrival.at_s + outcome.latency_s
                for arrival, outcome in zip(arrivals, outcomes, strict=True)
                if outcome.latency_s is not None
            )
            rows.append(summary(share, way, outcomes, took_s, slo_s))
    _, capacity_after = measure_alone(pipeline, mix)
    typer.echo(f"one at a time, measured again at the end: {capacity_after:.2f} images/s")
    typer.echo(show(rows))
    for scheduling, note in notes.items():
        typer.echo(f"{scheduling}: mean batch {note['mean_batch_size']:.2f}, caps {note['caps']}")
    if output is not None:
        result = {
            "command": "python -m tests.benchmarks.engine " + " ".join(sys.argv[1:]),
            "hardware": hardware(pipeline.device),
            "model": model,
            "dtype": str(pipeline.dtype),
            "seconds": seconds,
            "seed": seed,
            "slo_scale": slo_scale,
            "one_at_a_time_images_per_s": [capacity, capacity_after],
            "kinds": [asdict(kind) | {"alone_s": alone_s[kind]} for kind in mix],
            "rows": [asdict(row) for row in rows],
            "engine": notes,
        }
        output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
