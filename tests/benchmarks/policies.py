"""Compare scheduling policies in simulated time: ``python -m tests.benchmarks.policies``.

One engine serves the mix of sizes and steps of vLLM-Omni's benchmark on three devices:

- ``cpu``: the demo model on one CPU thread, as an engine measured it. Small images gain most.
- ``h200``: batches of eight gain a factor of 3.1 at 512x512, batches of two 1.02 at 1024x1024.
  These two are published figures of an H200. The other sizes are interpolated, and the times of
  single calls are round numbers of the right order.
- ``flat``: batches gain nothing.

Arrivals are a Poisson process; the load is relative to the capacity of one request at a time. A
request is in time if it ends within three times its time alone. Images per second are those of all
requests, over the time until the last one is done. Predictions are exact.

The closed loop has eight clients with equal requests, and sixteen clients with the mix.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Annotated

import typer

from serve_app.engine.scheduling.cost import Measurement, Size
from serve_app.engine.scheduling.on_time import OnTime
from serve_app.engine.scheduling.policies import Fifo
from serve_app.engine.scheduling.queue import Policy
from tests.benchmarks.former_on_time import FormerOnTime
from tests.benchmarks.simulation import (
    Arrival,
    Device,
    Engine,
    Kind,
    Load,
    Run,
    Serve,
    poisson,
    whole_batches,
)

SMALL, MEDIUM, WHOLE, LARGE = (512, 512), (768, 768), (1024, 1024), (1536, 1536)
MIX = [Kind(SMALL, 20, 0.15), Kind(MEDIUM, 20, 0.25), Kind(WHOLE, 25, 0.45), Kind(LARGE, 35, 0.15)]
ALIKE = [Kind(WHOLE, 20, 1.0)]
LOADS = (0.5, 0.7, 0.9, 1.1, 1.3, 1.5, 2.0)
MOST = 16
SEEDS = range(8)


def _curve(call_s: float, gains: dict[int, float], encode_s: float, decode_s: float) -> Measurement:
    calls = {size: size * call_s / gain for size, gain in ({1: 1.0} | gains).items()}
    return Measurement(calls, encode_s, decode_s)


def devices() -> dict[str, Device]:
    cpu: dict[Size, Measurement] = {
        SMALL: Measurement(
            {1: 0.0089, 2: 0.0098, 4: 0.01285, 8: 0.0171, 16: 0.0276}, 0.006, 0.0046
        ),
        MEDIUM: Measurement(
            {1: 0.0097, 2: 0.0127, 4: 0.0189, 8: 0.0294, 16: 0.0529}, 0.006, 0.0064
        ),
        WHOLE: Measurement({1: 0.011, 2: 0.0161, 4: 0.0261, 8: 0.0446, 16: 0.0996}, 0.006, 0.0106),
        LARGE: Measurement({1: 0.0168, 2: 0.0295, 4: 0.0586, 16: 0.234}, 0.006, 0.0232),
    }
    h200 = {
        SMALL: _curve(0.018, {2: 1.55, 4: 2.3, 8: 3.1, 16: 3.4}, 0.01, 0.02),
        MEDIUM: _curve(0.025, {2: 1.3, 4: 1.5, 8: 1.6, 16: 1.6}, 0.01, 0.04),
        WHOLE: _curve(0.035, {2: 1.02, 16: 1.02}, 0.01, 0.06),
        LARGE: _curve(0.09, {16: 1.0}, 0.01, 0.15),
    }
    call_s = {SMALL: 0.018, MEDIUM: 0.025, WHOLE: 0.035, LARGE: 0.09}
    flat = {size: _curve(seconds, {16: 1.0}, 0.01, 0.05) for size, seconds in call_s.items()}
    return {
        "cpu": Device.of(cpu, 0.00025),
        "h200": Device.of(h200, 0.001),
        "flat": Device.of(flat, 0.001),
    }


def engine_with(policy: Callable[[], Policy]) -> Serve:
    return lambda device, load: Engine(device, policy()).run(load)


WAYS: dict[str, Serve] = {
    "whole batches": lambda device, load: whole_batches(device, load, 8),
    "fifo": engine_with(Fifo),
    "former on_time": engine_with(FormerOnTime),
    "on_time": engine_with(lambda: OnTime(patience=3.0)),
}


@dataclass(frozen=True)
class Row:
    """One way on one device under one load; means over the seeds."""

    device: str
    load: str
    way: str
    images_per_s: float
    in_time: float
    p50_s: float
    p95_s: float
    mean_batch: float | None


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def row(device: str, load: str, way: str, runs: list[Run], closed: bool) -> Row:
    def mean(of: Callable[[Run], float]) -> float:
        return statistics.mean(of(run) for run in runs)

    def rate(run: Run) -> float:
        return run.window / run.window_s if closed else len(run.done) / run.took_s

    return Row(
        device,
        load,
        way,
        images_per_s=mean(rate),
        in_time=mean(lambda run: sum(one.in_time for one in run.done) / len(run.done)),
        p50_s=mean(lambda run: percentile([one.latency_s for one in run.done], 0.5)),
        p95_s=mean(lambda run: percentile([one.latency_s for one in run.done], 0.95)),
        mean_batch=mean(lambda run: run.rows / run.calls) if runs[0].calls else None,
    )


def simulate(count: int) -> list[Row]:
    rows = []
    for name, device in devices().items():
        capacity = device.capacity(MIX)
        for load in LOADS:
            for way, serve in WAYS.items():
                arrivals = [poisson(MIX, load * capacity, count, seed) for seed in SEEDS]
                runs = [serve(device, Load(trace)) for trace in arrivals]
                rows.append(row(name, f"{load:g}", way, runs, closed=False))
                show(rows[-1])
        for label, clients, kinds in (("8 alike", 8, ALIKE), ("16 mixed", 16, MIX)):
            for way, serve in WAYS.items():
                runs = []
                for seed in SEEDS:
                    drawn = Random(seed).choices(kinds, [one.share for one in kinds], k=2 * count)
                    requests = [Arrival(0.0, kind) for kind in drawn]
                    runs.append(serve(device, Load(requests, clients)))
                rows.append(row(name, label, way, runs, closed=True))
                show(rows[-1])
    return rows


def show(one: Row) -> None:
    batch = "" if one.mean_batch is None else f"{one.mean_batch:5.1f}"
    typer.echo(
        f"{one.device:<5} {one.load:>8} {one.way:<15} {one.images_per_s:7.2f} images/s "
        f"{one.in_time:5.0%} in time   p50 {one.p50_s:7.2f} s   p95 {one.p95_s:7.2f} s {batch}"
    )


def draw(rows: list[Row], path: Path) -> None:
    """Draw share in time, throughput and tail latency by load, for each device."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves: dict[str, Callable[[Row], float]] = {
        "in time, %": lambda one: 100 * one.in_time,
        "images/s": lambda one: one.images_per_s,
        "p95, s": lambda one: one.p95_s,
    }
    titles = {"cpu": "CPU, measured", "h200": "H200, from published gains", "flat": "no gain"}
    figure, axes = plt.subplots(3, len(titles), figsize=(13, 10), sharex=True, layout="constrained")
    for column, (name, title) in enumerate(titles.items()):
        for axis, (label, of) in zip(axes[:, column], curves.items(), strict=True):
            for way, style in zip(WAYS, ("s:", "^--", "o-.", "o-"), strict=True):
                mine = [one for one in rows if (one.device, one.way) == (name, way)]
                mine = [one for one in mine if one.load in {f"{load:g}" for load in LOADS}]
                axis.plot([float(one.load) for one in mine], list(map(of, mine)), style, label=way)
            axis.set(ylim=(0, None), ylabel="" if column else label)
        axes[0][column].set_title(title)
        axes[-1][column].set_xlabel("load, relative to one request at a time")
    axes[0][0].legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(
    count: Annotated[int, typer.Option(min=20, help="Requests of each trace.")] = 190,
    output: Annotated[Path | None, typer.Option(help="File for the results, as JSON.")] = None,
    chart: Annotated[Path | None, typer.Option(help="File for the chart, as PNG.")] = None,
) -> None:
    """Print the table."""
    rows = simulate(count)
    if chart is not None:
        draw(rows, chart)
    if output is not None:
        result = {
            "command": f"python -m tests.benchmarks.policies --count {count}",
            "requests": count,
            "traces": len(SEEDS),
            "rows": [asdict(one) for one in rows],
        }
        output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
