"""Compare the engine with the stock pipeline: ``python -m tests.benchmarks.engine``.

One run compares five ways to serve one trace of arrivals with one pipeline on one device:

- ``one at a time``: the stock pipeline, first come first served,
- ``whole batches``: the stock pipeline on a list of prompts, if the next requests are of one kind,
- ``engine, fifo`` and ``engine, on_time``: this engine with two of its policies,
- ``engine, former on_time``: this engine with its former default policy.

Latency counts from the time at which a request was due, even if it was sent later. A request
that fails or takes longer than ``slo_scale`` times its time alone misses its deadline. Efficiency
is the time of the bare network calls, at the same batch sizes, over the time in which the engine
had a request. The mix of sizes and steps is that of vLLM-Omni's benchmark, scaled
to the model's native size where that is small.

With ``--waiting 16``, 16 requests of one kind also arrive at once, first come first served.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.model.loader import resolve_device
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.scheduling.queue import RankedPolicy
from tests.benchmarks import saturation
from tests.benchmarks.aims import WAITING, aims
from tests.benchmarks.former_on_time import FormerOnTime
from tests.benchmarks.saturation import Saturated, saturate
from tests.benchmarks.ways import (
    Kind,
    Outcome,
    Way,
    trace,
    with_engine,
    with_stock_pipeline,
)
from tests.full_size import MODELS

MIX = ((0.5, 20, 15), (0.75, 20, 25), (1.0, 25, 45), (1.5, 35, 15))
"""Triples of side as a share of the whole side, steps, and share in percent."""

WHOLE_PX = 1024
"""The whole side of the mix; models for less than half of it use their native side."""

AT_ONCE = ((0.5, 20), (1.0, 25), (0.5, 4))
"""Pairs of side as a share of the whole side, and steps, for many requests at once."""

MAX_BATCH = 16

CPU_LOADS = (0.7, 0.9, 1.5)
"""Loads on a CPU. Shared steps serve more than one at a time can, so the last one is no overload
for full batches."""

CUDA_LOADS = (0.7, 0.9, 1.1)


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
    """95th percentile of the quickest kind."""
    slo: float
    """Share of requests that met their deadline."""
    efficiency: float | None
    """Efficiency of the engine; None for the stock ways."""


def scaled_kind(pipeline: LoadedPipeline, scale: float, steps: int, share: float = 0.0) -> Kind:
    """Return a kind whose sides are ``scale`` of the whole side."""

    def side(native: int) -> int:
        multiple = pipeline.size_multiple
        whole = native if native < WHOLE_PX // 2 else WHOLE_PX
        return max(multiple, round(whole * scale / multiple) * multiple)

    width, height = pipeline.default_size_px
    return Kind(side(width), side(height), steps, share)


def seconds_alone(pipeline: LoadedPipeline, kind: Kind) -> float:
    """Return the stock pipeline's median time for one image, without the first, which warms up."""
    repeats = 2 if pipeline.device.type == "cuda" else 5  # a CPU is shared with other programs
    taken = []
    for seed in range(repeats + 1):
        started_at = time.perf_counter()
        pipeline.generate(kind.params(seed)).cpu()
        taken.append(time.perf_counter() - started_at)
    return statistics.median(taken[1:])


def measure_alone(pipeline: LoadedPipeline, mix: list[Kind]) -> tuple[dict[Kind, float], float]:
    """Return seconds of each kind alone, and the images per second of the mix one at a time."""
    solo_s = {kind: seconds_alone(pipeline, kind) for kind in mix}
    return solo_s, 1 / sum(kind.share * solo_s[kind] for kind in mix)


def summary(
    load: float,
    way: str,
    outcomes: list[Outcome],
    took_s: float,
    slo_s: dict[Kind, float],
    efficiency: float | None,
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
        efficiency=efficiency,
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
    header = f"{'load':>5} {'':<22} {'images/s':>8} {'p50 s':>7} {'p95 s':>7} {'p99 s':>7}"
    lines = [f"{header} {'short p95 s':>11} {'in time':>8} {'effic.':>7}"]
    for row in rows:
        efficiency = "" if row.efficiency is None else f"{row.efficiency:.2f}"
        lines.append(
            f"{row.load:>5.2f} {row.way:<22} {row.images_per_s:>8.2f} {row.p50_s:>7.2f} "
            f"{row.p95_s:>7.2f} {row.p99_s:>7.2f} {row.short_p95_s:>11.2f} {row.slo:>8.0%} "
            f"{efficiency:>7}"
        )
    return "\n".join(lines)


def load_pipeline(model: str, device: str) -> tuple[LoadedPipeline, ModelConfig]:
    """Load the demo model, a full-size one with random weights, or one from a folder."""
    if model in MODELS:
        on = resolve_device(device)
        dtype = torch.bfloat16 if on.type == "cuda" else torch.float32
        config = ModelConfig.model_validate({"id": model, "device": device})
        return LoadedPipeline(MODELS[model](on, dtype), config), config
    path = {} if model == "demo" else {"path": str(Path(model).absolute())}
    config = ModelConfig.model_validate({"id": Path(model).name, "device": device, **path})
    return LoadedPipeline.load(config), config


def main(
    model: Annotated[
        str,
        typer.Option(
            help=f"'demo', a folder in the diffusers format, or, full-size with random weights, "
            f"{', '.join(MODELS)}."
        ),
    ] = "demo",
    device: Annotated[str, typer.Option(help="'cpu' or 'cuda'.")] = "cpu",
    load: Annotated[
        list[float] | None,
        typer.Option(help="Arrivals as a share of the capacity of one at a time; may be repeated."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            help="Seconds of arrivals for each way and load. Default: 40 on a CPU, else 120."
        ),
    ] = None,
    waiting: Annotated[
        int | None,
        typer.Option(
            help=f"Requests at once. Default: {WAITING} for a full-size model on a GPU, else none."
        ),
    ] = None,
    slo_scale: float = 3.0,
    threads: Annotated[
        int, typer.Option(help="Threads of torch on a CPU. More gain nothing with the demo model.")
    ] = 1,
    seed: int = 0,
    output: Annotated[Path | None, typer.Option(help="File for the results, as JSON.")] = None,
) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    pipeline, model_config = load_pipeline(model, device)
    on_cuda = pipeline.device.type == "cuda"
    if seconds is None:
        seconds = 120.0 if on_cuda else 40.0
    if waiting is None:
        waiting = WAITING if on_cuda and model in MODELS else 0
    mix = [scaled_kind(pipeline, scale, steps, share / 100) for scale, steps, share in MIX]
    solo_s, capacity = measure_alone(pipeline, mix)
    slo_s = {kind: slo_scale * seconds for kind, seconds in solo_s.items()}
    typer.echo(f"one at a time: {capacity:.2f} images/s on this mix")
    for one in mix:
        typer.echo(
            f"  {one.width}x{one.height}, {one.steps} steps, {one.share:.0%}: "
            f"{solo_s[one]:.2f} s alone"
        )

    def engine_with(
        scheduling: str,
        kinds: list[Kind],
        keep_images: bool = False,
        policy: Callable[[], RankedPolicy] | None = None,
    ) -> Way:
        config = EngineConfig.model_validate(
            {
                "scheduling": scheduling,
                "slo_scale": slo_scale,
                "max_batch_size": MAX_BATCH,
                "max_running": 256,
                "warmup_sizes_px": [(kind.width, kind.height) for kind in kinds],
                "profile_path": str(Path(folder) / "profile.json"),
            }
        )
        return with_engine(pipeline, model_config, config, keep_images, policy)

    rows: list[Row] = []
    reports: list[dict[str, Any]] = []
    saturated: list[Saturated] = []
    with tempfile.TemporaryDirectory() as folder:
        for scale, steps in AT_ONCE if waiting else ():
            one = scaled_kind(pipeline, scale, steps)
            serve = engine_with("fifo", [one], keep_images=True)
            saturated.append(saturate(pipeline, serve, one, waiting))
        ways = {
            "one at a time": with_stock_pipeline(pipeline, 1),
            "whole batches": with_stock_pipeline(pipeline, MAX_BATCH),
            "engine, fifo": engine_with("fifo", mix),
            "engine, on_time": engine_with("on_time", mix),
            "engine, former on_time": engine_with("on_time", mix, policy=FormerOnTime),
        }
        for share in load or (CUDA_LOADS if on_cuda else CPU_LOADS):
            arrivals = trace(mix, share * capacity, seconds, seed)
            for way, serve in ways.items():
                served = serve(arrivals)
                took_s = max(
                    arrival.at_s + outcome.latency_s
                    for arrival, outcome in zip(arrivals, served.outcomes, strict=True)
                    if outcome.latency_s is not None
                )
                report = served.report
                efficiency = None if report is None else report.efficiency
                rows.append(summary(share, way, served.outcomes, took_s, slo_s, efficiency))
                if report is not None:
                    reports.append({"load": share, "way": way, **asdict(report)})
    _, capacity_after = measure_alone(pipeline, mix)
    typer.echo(f"one at a time, measured again at the end: {capacity_after:.2f} images/s")
    typer.echo(show(rows))
    for line in reports:
        typer.echo(
            f"{line['way']} at {line['load']:g}: mean batch {line['mean_batch_size']:.2f}, "
            f"caps {line['caps']}, finish predicted within {line['forecast_error']:.0%} (median)"
        )
    if saturated:
        typer.echo(saturation.show(saturated))
    verdicts = aims(model, rows, saturated) if on_cuda else []
    for aim in verdicts:
        typer.echo(f"{aim.text}: {aim.verdict}")
    if output is not None:
        result = {
            "command": "python -m tests.benchmarks.engine " + " ".join(sys.argv[1:]),
            "hardware": hardware(pipeline.device),
            "model": model,
            "weights": "random" if model in MODELS else "trained",
            "dtype": str(pipeline.dtype),
            "seconds": seconds,
            "seed": seed,
            "slo_scale": slo_scale,
            "one_at_a_time_images_per_s": [capacity, capacity_after],
            "kinds": [asdict(kind) | {"solo_s": solo_s[kind]} for kind in mix],
            "rows": [asdict(row) for row in rows],
            "engine": reports,
            "at_once": [asdict(row) | {"speedup": row.speedup} for row in saturated],
            "aims": [asdict(aim) | {"verdict": aim.verdict} for aim in verdicts],
        }
        output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
