"""Measure what the engine adds to each step of a request: ``python -m tests.benchmarks.overhead``.

The denoiser of the demo model is replaced by one that costs next to nothing. What remains of a step
is Python: the stock pipeline's own, and what the engine adds to it. Both are the difference between
a long and a short run, so that encoding and decoding cancel out. Both are CPU time of one thread,
which hardly depends on what else runs on the machine.

The engine runs each request in calls of its own, so that a step pays for a whole call, or all of
them in batches of 16, first come first served.

With ``--output`` a run is added to a file, under its ``--label``. So two versions can be measured
in turns, and compared by their medians.
"""

import cProfile
import functools
import gc
import json
import pstats
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.loader import load_stock
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.scheduling.policies import Fifo
from serve_app.protocol.params import GenerationParams
from tests.benchmarks.engine import hardware

TOGETHER = (1, 8, 32, 128)
"""Numbers of equal requests that arrive at once."""

BATCHES = (1, 16)
"""Batch sizes of the two ways to run them."""

SHORT, LONG = 5, 45
"""Steps of the two runs."""


def cheap_pipeline() -> LoadedPipeline:
    """Load the demo model, with a denoiser of three operations."""
    model = ModelConfig(id="demo", device="cpu")
    stock = load_stock(model)

    @functools.wraps(stock.unet.forward)
    def forward(
        sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor]:
        seen = encoder_hidden_states[:, 0, 0].view(-1, 1, 1, 1) + 1e-3 * timestep.view(-1, 1, 1, 1)
        return (torch.addcmul(0.1 * seen, sample, sample.new_full((), 0.3)),)

    stock.unet.forward = forward
    return LoadedPipeline(stock, model)


def engine_on(pipeline: LoadedPipeline, batch: int) -> Engine:
    """Start an engine that runs all requests at once, in batches of 1 or of ``batch``."""
    config = EngineConfig(max_running=max(TOGETHER), max_batch_size=16, max_backlog_s=1e6)
    policy = Fifo() if batch > 1 else None
    engine = Engine(pipeline, ModelConfig(id="demo", device="cpu"), config, policy)
    engine.cost.max_batch_size = batch
    return engine


def with_engine(engine: Engine, requests: int, steps: int) -> None:
    """Generate so many equal images together."""
    ended = threading.Semaphore(0)

    def on_event(event: object) -> None:
        if type(event).__name__ in ("Completed", "Failed"):
            assert type(event).__name__ == "Completed", event
            ended.release()

    for seed in range(requests):
        engine.submit(params(seed, steps), on_event)
    for _ in range(requests):
        ended.acquire()


def params(seed: int, steps: int) -> GenerationParams:
    return GenerationParams("a red circle", seed, width=32, height=32, num_inference_steps=steps)


def ms_per_step(run: Callable[[int], object]) -> float:
    """Return the milliseconds of one step of ``run(steps)``, in CPU time of this process."""
    taken_s = []
    for steps in (SHORT, LONG):
        started_at = time.process_time()
        run(steps)
        taken_s.append(time.process_time() - started_at)
    return 1000 * (taken_s[1] - taken_s[0]) / (LONG - SHORT)


def measure(pipeline: LoadedPipeline, batch: int, rounds: int) -> list[dict[str, float]]:
    """Return a row for each number of requests: medians of the rounds."""
    found: dict[int, list[tuple[float, float]]] = {requests: [] for requests in TOGETHER}
    with engine_on(pipeline, batch) as engine, torch.no_grad():

        def stock(steps: int) -> None:
            pipeline.generate(engine_params(steps))

        def engine_params(steps: int) -> GenerationParams:
            return params(1, steps).resolved(engine.info)

        for requests in TOGETHER:
            with_engine(engine, requests, SHORT)  # not counted: caches fill
        for _ in range(rounds):
            stock_ms = statistics.median(ms_per_step(stock) for _ in range(9))
            for requests in TOGETHER:
                together_ms = ms_per_step(functools.partial(with_engine, engine, requests))
                found[requests].append((together_ms / requests, stock_ms))
        calls = {requests: calls_per_step(engine, requests) for requests in TOGETHER}
    return [
        {
            "batch": batch,
            "requests": requests,
            "engine_ms": statistics.median(engine_ms for engine_ms, _ in pairs),
            "stock_ms": statistics.median(stock_ms for _, stock_ms in pairs),
            "added_ms": statistics.median(engine_ms - stock_ms for engine_ms, stock_ms in pairs),
            "calls": calls[requests],
        }
        for requests, pairs in found.items()
    ]


def profiled(engine: Engine, requests: int, steps: int) -> cProfile.Profile:
    """Profile the engine's thread while it generates so many images."""
    profile, ended = cProfile.Profile(), threading.Event()
    engine._commands.put(profile.enable)
    with_engine(engine, requests, steps)
    engine._commands.put(profile.disable)
    engine._commands.put(ended.set)
    ended.wait()
    return profile


def calls_per_step(engine: Engine, requests: int) -> float:
    """Return how many functions the engine's thread calls in one step of a request.

    The number does not depend on the machine. It includes those of the stock pipeline.
    """
    called = [
        sum(entry.callcount for entry in profiled(engine, requests, steps).getstats())
        for steps in (SHORT, LONG)
    ]
    return (called[1] - called[0]) / (LONG - SHORT) / requests


def show(rows: list[dict[str, float]]) -> str:
    """Return a table; times are in milliseconds for one step of a request."""
    lines = ["".join(f"{name:>11}" for name in rows[0])]
    lines += ["".join(f"{value:>11.4g}" for value in row.values()) for row in rows]
    return "\n".join(lines)


def main(
    label: Annotated[str, typer.Option(help="Name of the version that is measured.")] = "now",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each row.")] = 5,
    profile: Annotated[
        int, typer.Option(help="Instead, profile the engine's thread with so many requests.")
    ] = 0,
    output: Annotated[
        Path | None, typer.Option(help="File of runs, as JSON, to which this run is added.")
    ] = None,
) -> None:
    """Print the milliseconds that the engine adds to a step of a request."""
    torch.set_num_threads(1)
    if profile:
        with engine_on(cheap_pipeline(), batch=1) as engine:
            found = profiled(engine, profile, LONG)
        pstats.Stats(found).sort_stats("tottime").print_stats(60)
        return
    pipeline = cheap_pipeline()
    gc.collect()
    gc.freeze()  # as a replica does: the objects of its start are not visited again
    rows = [row for batch in BATCHES for row in measure(pipeline, batch, rounds)]
    typer.echo(show(rows))
    if output is not None:
        results = {
            "command": "python -m tests.benchmarks.overhead --label LABEL --output FILE",
            "hardware": hardware(torch.device("cpu")),
            "steps": [SHORT, LONG],
            "runs": json.loads(output.read_text())["runs"] if output.exists() else [],
        }
        results["runs"].append({"label": label, "rows": rows})
        output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
