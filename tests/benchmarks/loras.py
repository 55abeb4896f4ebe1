"""What adapters on demand cost: ``python -m tests.benchmarks.loras``.

Requests name adapters of which a few are popular and most are rare: the share of the adapter of
rank r is 1/r. There is room for a few of them in memory. Three engines take turns at the same
requests, some of them at a time, from clients in a closed loop:

- ``at the start``: all adapters are in memory, and nothing is loaded,
- ``on demand``: a request loads its adapter while others go on,
- ``in line``: the simplest way to load one. The engine's thread does it, between two calls.

A stall is the time from the end of a denoiser call to the begin of the next one, while requests
run. Encoders and decoders run in it as well. Each image is compared with that of the first way.
The process has the settings of a replica: garbage collections pass over the objects of the start,
and threads take turns at the interpreter every 0.2 ms.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor as Pool
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from torch import Tensor

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.config.source import DEMO_MODEL_DIR
from serve_app.deployments.process import freeze_garbage_collector, share_the_interpreter
from serve_app.engine.engine import Engine
from serve_app.engine.executor import Executor
from serve_app.engine.loras import loader
from serve_app.engine.request import Request
from serve_app.engine.startup.comparison import largest_difference
from serve_app.metrics.registry import ENGINE
from serve_app.protocol.params import GenerationParams
from tests.benchmarks.engine import hardware
from tests.lora import save_adapters

WAYS = ("at the start", "on demand", "in line")


@dataclass
class Row:
    """What one way did, over all of its turns."""

    way: str
    images: int = 0
    seconds: float = 0.0
    loads: int = 0
    hits: int = 0
    evictions: int = 0
    stalls_ms: list[float] = field(default_factory=list, repr=False)
    load_s: float = 0.0
    largest_difference: float = 0.0

    def result(self) -> dict[str, Any]:
        """Return the figures of the table."""
        figures = {key: value for key, value in asdict(self).items() if key != "stalls_ms"}
        cuts = statistics.quantiles(self.stalls_ms, n=1000, method="inclusive")
        return figures | {
            "images_per_s": self.images / self.seconds,
            "stall_ms": {"p50": cuts[499], "p99": cuts[989], "p999": cuts[998]},
            "longest_stall_ms": max(self.stalls_ms),
        }


def requests(count: int, adapters: Sequence[str], steps: int, seed: int) -> list[GenerationParams]:
    """Return requests, each with one adapter; a few adapters are popular."""
    random = Random(seed)
    names = list(adapters)
    random.shuffle(names)
    shares = [1 / rank for rank in range(1, len(names) + 1)]
    return [
        GenerationParams(
            "a red circle on a blue background",
            number,
            num_inference_steps=steps,
            lora=((name, 0.5),),
            acceleration="none",
        )
        for number, name in enumerate(random.choices(names, shares, k=count))
    ]


class InLine(Pool):
    """Runs a load at once, on the thread that asks for it: the engine's."""

    def submit(self, do: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        do(*args, **kwargs)
        return Future()


@contextmanager
def engine_of(way: str, folder: Path, room: int, clients: int) -> Iterator[Engine]:
    """Start the engine of one way. Its metrics have the way as their model."""
    key = "lora_folder" if way == WAYS[0] else "lora_source"
    model = ModelConfig.model_validate(
        {"id": way, "path": str(DEMO_MODEL_DIR), "device": "cpu", key: str(folder)}
    )
    config = EngineConfig(
        max_running=clients,
        max_loaded_loras=room,
        max_backlog_s=1e9,
        profile_path="none",
    )
    with (
        patch.object(loader, "ThreadPoolExecutor", lambda *_: InLine())
        if way == "in line"
        else nullcontext()
    ):
        engine = Engine.load(model, config)
    with engine:
        yield engine


@contextmanager
def stalls(row: Row) -> Iterator[None]:
    """Note the time between denoiser calls in the block; all in it are of one engine."""
    ended_at: float | None = None
    denoise = Executor.denoise

    def timed(self: Executor, batch: Sequence[Request]) -> list[Any]:
        nonlocal ended_at
        if ended_at is not None:
            row.stalls_ms.append(1000 * (time.perf_counter() - ended_at))
        outcomes = denoise(self, batch)
        ended_at = time.perf_counter()
        return outcomes

    with patch.object(Executor, "denoise", timed):
        yield


def turn(engine: Engine, row: Row, asked: Sequence[GenerationParams], clients: int) -> list[Tensor]:
    """Generate images from clients in a closed loop, and add to the row what it took."""
    with stalls(row), ThreadPoolExecutor(clients) as pool:
        started_at = time.perf_counter()
        images = list(pool.map(lambda params: engine.generate(params).pixels, asked))
        row.seconds += time.perf_counter() - started_at
    row.images += len(images)
    return images


def counted(way: str, name: str, **labels: str) -> float:
    return ENGINE.get_sample_value(f"diffusion_serve_{name}", {"model": way, **labels}) or 0.0


def measure(
    folder: Path, names: Sequence[str], count: int, room: int, steps: int, clients: int, rounds: int
) -> list[Row]:
    """Return a row for each way."""
    asked = requests(count, names, steps, seed=0)
    size = -(-count // rounds)
    rows = {way: Row(way) for way in WAYS}
    with ExitStack() as stack:
        engines = {way: stack.enter_context(engine_of(way, folder, room, clients)) for way in WAYS}
        freeze_garbage_collector()
        share_the_interpreter()
        for number in range(rounds):
            part = asked[number * size : (number + 1) * size]
            order = [WAYS[(number + index) % len(WAYS)] for index in range(len(WAYS))]
            images = {way: turn(engines[way], rows[way], part, clients) for way in order}
            for way, row in rows.items():
                different = largest_difference(images[WAYS[0]], images[way])
                row.largest_difference = max(row.largest_difference, different)
    for way, row in rows.items():
        row.loads = int(counted(way, "lora_loads_total", result="loaded"))
        row.hits = int(counted(way, "lora_hits_total"))
        row.evictions = int(counted(way, "lora_evictions_total"))
        row.load_s = counted(way, "lora_load_seconds_sum") / max(1, row.loads)
    return list(rows.values())


def show(results: Sequence[dict[str, Any]]) -> str:
    """Return the table."""
    lines = [
        f"{'':<13} {'images/s':>8} {'loads':>6} {'hits':>5} {'evicted':>7} {'load s':>7} "
        f"{'stall p50':>9} {'p99':>7} {'p99.9':>7} {'longest ms':>10} {'difference':>10}"
    ]
    for one in results:
        stall = one["stall_ms"]
        lines.append(
            f"{one['way']:<13} {one['images_per_s']:>8.2f} {one['loads']:>6} {one['hits']:>5} "
            f"{one['evictions']:>7} {one['load_s']:>7.2f} {stall['p50']:>9.1f} "
            f"{stall['p99']:>7.1f} {stall['p999']:>7.1f} {one['longest_stall_ms']:>10.1f} "
            f"{one['largest_difference']:>10.1e}"
        )
    return "\n".join(lines)


def main(
    count: Annotated[int, typer.Option("--requests")] = 200,
    adapters: int = 40,
    room: Annotated[int, typer.Option(help="Adapters on demand in memory.")] = 8,
    steps: int = 10,
    clients: Annotated[int, typer.Option(help="Clients of the closed loop.")] = 8,
    rounds: Annotated[int, typer.Option(help="Turns of each way.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    output: Annotated[Path | None, typer.Option(help="File for the results, as JSON.")] = None,
) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    names = [f"style-{number}" for number in range(adapters)]
    with tempfile.TemporaryDirectory() as folder:
        save_adapters(Path(folder), names)
        rows = measure(Path(folder), names, count, room, steps, clients, rounds)
    results = [row.result() for row in rows]
    typer.echo(show(results))
    if output is not None:
        context = {
            "command": "python -m tests.benchmarks.loras",
            "hardware": hardware(torch.device("cpu")),
            "requests": count,
            "adapters": adapters,
            "room": room,
            "steps": steps,
            "clients": clients,
            "rounds": rounds,
        }
        output.write_text(json.dumps(context | {"rows": results}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
