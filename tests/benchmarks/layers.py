"""Measure where the time of a request goes: ``python -m tests.benchmarks.layers``.

Requests of the demo model run alone and eight together, first come first served, in two ways:

- in this process, where the parts of the engine are timed one by one. Each round also has the
  floor: the stock pipeline with a list of as many prompts.
- over HTTP. The answer's timings tell the engine's part from Serve's and the client's.

With ``--output`` a run is added to a file, under its ``--label``. So two versions can be measured
in turns, and compared by their medians.
"""

import gc
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import torch
import typer

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine import executor
from serve_app.engine.batching.batch import BatchSpec
from serve_app.engine.batching.rendezvous import Call, Job, Rendezvous
from serve_app.engine.engine import Engine
from serve_app.engine.executor import Executor
from serve_app.engine.metrics import EngineMetrics
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.predictor import Predictor
from serve_app.engine.runner import Runner
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.scheduling.cost import CostModel
from serve_app.engine.scheduling.load import LoadTracker
from serve_app.protocol.params import GenerationParams
from tests.benchmarks.engine import hardware
from tests.benchmarks.stopwatch import Place, Stopwatch
from tests.serve_process import demo_config, free_port, serving_config

PROMPT = "a red circle on a blue background"
STEPS = 20
TOGETHER = (1, 8)
"""Numbers of equal requests that arrive at once."""


def places(pipeline: LoadedPipeline) -> list[Place]:
    """Return the functions of the engine's thread, with their layers."""

    def network(_: Rendezvous, call: Call) -> str:
        return "denoiser" if call.site in pipeline.denoisers else "text encoder and VAE"

    noise_scheduler = type(pipeline.stock.scheduler)
    return [
        (Rendezvous, "forward", network),
        (noise_scheduler, "step", "noise scheduler"),
        (Job, "start", "pipeline up to its first call"),
        (Job, "resume", "pipeline between its calls"),
        (LoadedPipeline, "read_prompt", "reading the prompt"),
        (LoadedPipeline, "_copy_for_call", "copy of the pipeline"),
        (Executor, "prepare", "merge keys"),
        (BatchSpec, "merge", "merging and splitting"),
        (BatchSpec, "split", "merging and splitting"),
        (executor, "marked", "marking of infinity"),
        (Runner, "emit", "events"),
        (Runner, "_update_remaining", "predictions and load"),
        (Predictor, "step_s", "predictions and load"),
        (Predictor, "observe_between", "predictions and load"),
        (CostModel, "observe_call", "predictions and load"),
        (LoadTracker, "called", "predictions and load"),
        (EngineMetrics, "called", "metrics"),
        (EngineMetrics, "paused", "metrics"),
        (Engine, "_accept", "admission"),
        *((Scheduler, name, "policy") for name in ("start_next", "next_stage", "next_batch")),
        *((Scheduler, name, "policy") for name in ("park_at_stage", "park_at_denoiser")),
    ]


# ---- in this process ---------------------------------------------------------------------------


def with_engine(engine: Engine, requests: int) -> float:
    """Return the milliseconds of so many equal requests."""
    ended = threading.Semaphore(0)

    def on_event(event: object) -> None:
        if type(event).__name__ in ("Completed", "Failed"):
            ended.release()

    started_at = time.perf_counter()
    for seed in range(requests):
        engine.submit(GenerationParams(PROMPT, seed, num_inference_steps=STEPS), on_event)
    for _ in range(requests):
        ended.acquire()
    return 1000 * (time.perf_counter() - started_at)


def with_list(pipeline: LoadedPipeline, requests: int) -> float:
    """Return the milliseconds of the stock pipeline with a list of prompts."""
    pipeline.stock.set_progress_bar_config(disable=True)
    started_at = time.perf_counter()
    pipeline.stock(
        prompt=[PROMPT] * requests,
        num_inference_steps=STEPS,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(requests)],
        output_type="pt",
    )
    return 1000 * (time.perf_counter() - started_at)


def in_process(rounds: int) -> dict[int, dict[str, Any]]:
    """Return the layers of the engine, and the floor, by the number of requests."""
    model = ModelConfig(id="demo", device="cpu")
    config = EngineConfig(scheduling="fifo", max_batch_size=16, max_backlog_s=1e6)
    pipeline = LoadedPipeline.load(model)
    found: dict[int, dict[str, Any]] = {}
    with Engine(pipeline, model, config) as engine:
        for requests in TOGETHER:
            with_engine(engine, requests)  # not counted: caches fill
            with_list(pipeline, requests)
            layers: dict[str, list[float]] = {}
            engine_ms, floor_ms = [], []
            for _ in range(rounds):
                floor_ms.append(with_list(pipeline, requests))
                engine_ms.append(with_engine(engine, requests))
                stopwatch = Stopwatch()
                with stopwatch.watching(places(pipeline)):
                    watched_ms = with_engine(engine, requests)
                parts = stopwatch.spent_ms()
                parts["rest of the engine"] = watched_ms - sum(parts.values())
                for name, spent_ms in parts.items():
                    layers.setdefault(name, []).append(spent_ms)
            found[requests] = {
                "engine_ms": statistics.median(engine_ms),
                "floor_ms": statistics.median(floor_ms),
                "over_floor": statistics.median(
                    engine / floor for engine, floor in zip(engine_ms, floor_ms, strict=True)
                ),
                "layers_ms": {name: statistics.median(taken) for name, taken in layers.items()},
            }
    return found


def collection() -> dict[str, float]:
    """Return the milliseconds of a full garbage collection here, and the number of its objects."""
    gc.collect()  # the second one finds no garbage
    started_at = time.perf_counter()
    gc.collect()
    return {"ms": 1000 * (time.perf_counter() - started_at), "objects": len(gc.get_objects())}


# ---- over HTTP ---------------------------------------------------------------------------------


@contextmanager
def served() -> Iterator[Callable[[int, int], dict[str, float]]]:
    """Start the demo, and yield a function that requests one image and returns its times."""
    config = demo_config(free_port())
    config["applications"][0]["args"]["engine"]["scheduling"] = "fifo"
    with serving_config(config) as url, httpx.Client(base_url=url, timeout=120) as client:

        def request(seed: int, steps: int) -> dict[str, float]:
            body = {"prompt": PROMPT, "seed": seed, "num_inference_steps": steps}
            started_at = time.perf_counter()
            response = client.post("/v1/images/generations", json=body)
            took_s = time.perf_counter() - started_at
            timings: dict[str, float] = response.raise_for_status().json()["timings"]
            return {
                "client and Serve's proxy": 1000 * (took_s - timings["total_s"]),
                "gateway, Serve's handle and queue": 1000 * timings["queue_s"],
                "encode": 1000 * timings["encode_s"],
                "denoise": 1000 * timings["denoise_s"],
                "decode": 1000 * timings["decode_s"],
                "PNG file, and answer": 1000 * timings["response_s"],
                "in all": 1000 * took_s,
            }

        yield request


def over_http(rounds: int) -> dict[int, dict[str, float]]:
    """Return the median milliseconds of each part of a request, by the number of requests."""
    found: dict[int, dict[str, float]] = {}
    with served() as request, ThreadPoolExecutor(max(TOGETHER)) as clients:
        for requests in TOGETHER:
            seen: list[dict[str, float]] = []
            for number in range(rounds + 1):
                sent = [clients.submit(request, seed, STEPS) for seed in range(requests)]
                answers = [one.result() for one in sent]
                if number:  # the first round warms up
                    seen += answers
            found[requests] = {
                part: statistics.median(answer[part] for answer in seen) for part in seen[0]
            }
    return found


# ---- the report --------------------------------------------------------------------------------


def show(run: dict[str, Any]) -> str:
    lines = []
    for row in run["rows"]:
        lines.append(
            f"{row['requests']} together: engine {row['engine_ms']:.1f} ms, stock pipeline "
            f"{row['floor_ms']:.1f} ms, ratio {row['over_floor']:.3f}"
        )
        parts = row["layers_ms"] | {f"HTTP: {name}": ms for name, ms in row["http_ms"].items()}
        lines += [f"  {name:<36} {spent_ms:>8.2f} ms" for name, spent_ms in parts.items()]
    lines.append(f"a full garbage collection: {run['collection']['ms']:.0f} ms")
    return "\n".join(lines)


def main(
    label: Annotated[str, typer.Option(help="Name of the version that is measured.")] = "now",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each part.")] = 7,
    http: Annotated[bool, typer.Option(help="Also measure over HTTP.")] = True,
    output: Annotated[
        Path | None, typer.Option(help="File of runs, as JSON, to which this run is added.")
    ] = None,
) -> None:
    """Print the layers of one request alone and of eight together."""
    torch.set_num_threads(1)
    engine = in_process(rounds)
    parts = over_http(rounds) if http else {}
    rows = [
        {"requests": requests, **engine[requests], "http_ms": parts.get(requests, {})}
        for requests in TOGETHER
    ]
    run = {"label": label, "rows": rows, "collection": collection()}
    typer.echo(show(run))
    if output is not None:
        results = {
            "command": "python -m tests.benchmarks.layers --label LABEL --output FILE",
            "hardware": hardware(torch.device("cpu")),
            "steps": STEPS,
            "runs": json.loads(output.read_text())["runs"] if output.exists() else [],
        }
        results["runs"].append(run)
        output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
