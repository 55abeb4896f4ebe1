"""What fewer denoiser calls cost and gain: ``python -m tests.benchmarks.extrapolation``.

One engine serves clients in a closed loop, each with its next request once the last one is
answered. They ask for held-out pairs of a prompt and a seed of the demo model, in several ways:

- ``none``, ``balanced`` and ``fast``: the model's own noise scheduler at all steps,
- at as many calls as the two levels make: the model's own noise scheduler, DPM++ and UniPC.

The ways take turns, a few pairs at a time, in an order that rotates: a slow minute affects all of
them. The distance of an image is its PSNR: to that of ``none``, and to a truth, which is the
model's own noise scheduler at many steps. The marks are the shares of images with all colours, the
background and all shapes right, by the judge of the demo model.

Then one trace of arrivals is served without acceleration and with ``balanced``, by the default
policy. At the end, tiny pipelines of several families generate at each level, and with the
threshold of ``fast`` lifted. Their weights are random, so that says little of their quality.
"""

import json
import queue
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.config.speed import Acceleration, AccelerationConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.startup.comparison import psnr_db
from serve_app.protocol.events import Completed, Event, Failed, GenerationResult
from serve_app.protocol.params import GenerationParams
from tests.benchmarks.engine import MIX, Row, hardware, measure_alone, scaled_kind, show, summary
from tests.benchmarks.ways import trace, with_engine
from tests.tiny_pipelines import CALL_KWARGS, FAMILIES, HEIGHT_PX, WIDTH_PX
from tools.demo_model.evaluate import GeneratedImage, accuracy
from tools.demo_model.judge import judge
from tools.demo_model.scenes import Scene, caption, sample_scene

GUIDANCE = 7.5
PILOT = 16
"""Pairs that show how many calls the levels make."""

SLO_SCALE = 3.0
LOADS = (0.9, 1.5)
"""Arrivals of the trace, as a share of the capacity of one at a time without acceleration."""

TINY = ("sdxl", "sd3", "flux", "qwen-image", "sana", "pixart-sigma")


@dataclass(frozen=True)
class Way:
    """One way to generate the image of a pair."""

    name: str
    level: Acceleration
    noise_scheduler: str | None
    steps: int


@dataclass(frozen=True)
class Pair:
    """A held-out scene, its caption and a seed."""

    scene: Scene
    prompt: str
    seed: int

    def params(self, way: Way) -> GenerationParams:
        return GenerationParams(
            self.prompt,
            self.seed,
            num_inference_steps=way.steps,
            guidance_scale=GUIDANCE,
            noise_scheduler=way.noise_scheduler,
            acceleration=way.level,
        )


@dataclass
class Measured:
    """The images of one way, in the order of the pairs, and its time for each turn."""

    images: list[Tensor] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    images_per_s: list[float] = field(default_factory=list)


def held_out(count: int, seed: int) -> list[Pair]:
    """Draw pairs as the evaluation of the demo model does. Training never saw them."""
    rng = Random(f"held out {seed}")
    scenes = [sample_scene(rng, held_out=True, pairs=0.25) for _ in range(count)]
    prompts = [caption(scene, rng, name_background=True) for scene in scenes]
    pairs = enumerate(zip(scenes, prompts, strict=True))
    return [Pair(scene, prompt, seed + index) for index, (scene, prompt) in pairs]


def closed_loop(
    engine: Engine, requests: Sequence[GenerationParams], clients: int
) -> tuple[list[GenerationResult], float]:
    """Keep ``clients`` requests in the engine; return the results in order, and the seconds."""
    ends: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
    results: dict[int, GenerationResult] = {}
    left = iter(enumerate(requests))

    def send() -> None:
        if (following := next(left, None)) is None:
            return
        index, request = following

        def on_event(event: Event) -> None:
            if isinstance(event, Completed | Failed):
                ends.put((index, event))

        engine.submit(request, on_event)

    started_at = time.perf_counter()
    for _ in range(clients):
        send()
    while len(results) < len(requests):
        index, event = ends.get()
        if not isinstance(event, Completed):
            raise AssertionError(f"request {requests[index]} ended with {event}")
        results[index] = replace(event.result, pixels=event.result.pixels.cpu())
        send()
    took_s = time.perf_counter() - started_at
    return [results[index] for index in range(len(requests))], took_s


def measure(
    engine: Engine, ways: Sequence[Way], pairs: Sequence[Pair], clients: int, together: int
) -> dict[Way, Measured]:
    """Let the ways take turns of ``together`` pairs, and return what each one generated."""
    found = {way: Measured() for way in ways}
    for turn, start in enumerate(range(0, len(pairs), together)):
        part = pairs[start : start + together]
        for index in range(len(ways)):
            way = ways[(turn + index) % len(ways)]
            results, took_s = closed_loop(engine, [pair.params(way) for pair in part], clients)
            found[way].images += [result.pixels for result in results]
            found[way].calls += [result.calls.made for result in results]
            found[way].images_per_s.append(len(part) / took_s)
    return found


def peers(levels: dict[Way, Measured]) -> list[Way]:
    """Return the ways at as many calls as the levels make, without acceleration."""
    found = []
    for level, measured in levels.items():
        steps = round(statistics.mean(measured.calls))
        found += [
            Way(f"{scheduler or 'own'}, calls of {level.level}", "none", scheduler, steps)
            for scheduler in (None, "dpm++", "unipc")
        ]
    return found


def row_of(
    way: Way,
    found: Measured,
    none: Measured,
    truth: Sequence[Tensor],
    pairs: Sequence[Pair],
) -> dict[str, Any]:
    to_none = [psnr_db(one, two) for one, two in zip(found.images, none.images, strict=True)]
    to_truth = [psnr_db(one, two) for one, two in zip(found.images, truth, strict=True)]
    judged = []
    for pair, pixels in zip(pairs, found.images, strict=True):
        image = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        judged.append(GeneratedImage(pair.scene, pair.prompt, image, judge(image, pair.scene)))
    speed = zip(found.images_per_s, none.images_per_s, strict=True)
    return {
        **asdict(way),
        "calls": statistics.mean(found.calls),
        "images_per_s": statistics.median(found.images_per_s),
        "speedup": statistics.median(mine / its for mine, its in speed),
        "psnr_to_none_db": statistics.median(to_none),
        "least_psnr_to_none_db": min(to_none),
        "psnr_to_truth_db": statistics.median(to_truth),
        "marks": accuracy(judged),
    }


def front(
    pipeline: LoadedPipeline,
    model: ModelConfig,
    pairs: Sequence[Pair],
    steps: int,
    truth_steps: int,
    clients: int,
    together: int,
) -> list[dict[str, Any]]:
    """Return a row for each way."""
    config = EngineConfig.model_validate(
        {
            "max_backlog_s": 1e9,
            "limits": {"max_steps": max(100, truth_steps)},
            "profile_path": "none",
        }
    )
    none, balanced, fast = (
        Way(level, level, None, steps) for level in ("none", "balanced", "fast")
    )
    with Engine(pipeline, model, config) as engine:
        levels = measure(engine, [balanced, fast], pairs[:PILOT], clients, PILOT)
        ways = [none, balanced, fast, *peers(levels)]
        found = measure(engine, ways, pairs, clients, together)
        true = Way("truth", "none", None, truth_steps)
        truth, _ = closed_loop(engine, [pair.params(true) for pair in pairs], clients)
    images = [result.pixels for result in truth]
    return [row_of(way, found[way], found[none], images, pairs) for way in ways]


def deadlines(pipeline: LoadedPipeline, model: ModelConfig, seconds: float, seed: int) -> list[Row]:
    """Serve one trace without acceleration and with ``balanced``, by the default policy.

    On one thread of torch, as `tests.benchmarks.engine` does: the other core is for the clients.
    """
    torch.set_num_threads(1)
    mix = [scaled_kind(pipeline, scale, steps, share / 100) for scale, steps, share in MIX]
    solo_s, capacity = measure_alone(pipeline, mix)
    slo_s = {kind: SLO_SCALE * alone_s for kind, alone_s in solo_s.items()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(max_running=256, profile_path=str(Path(folder) / "profile.json"))
        for load in LOADS:
            arrivals = trace(mix, load * capacity, seconds, seed)
            for level in ("none", "balanced"):
                acceleration = AccelerationConfig(default=level)
                leveled = model.model_copy(update={"acceleration": acceleration})
                served = with_engine(pipeline, leveled, config)(arrivals)
                took_s = max(
                    arrival.at_s + outcome.latency_s
                    for arrival, outcome in zip(arrivals, served.outcomes, strict=True)
                    if outcome.latency_s is not None
                )
                rows.append(summary(load, level, served.outcomes, took_s, slo_s, None))
    return rows


def families(steps: int, images: int) -> list[dict[str, Any]]:
    """Return calls and distances of tiny pipelines, at each level and without a threshold."""
    rows = []
    for name in TINY:
        model = ModelConfig.model_validate(
            {
                "id": name,
                "device": "cpu",
                "call_kwargs": CALL_KWARGS.get(name, {}),
                "default_size_px": (WIDTH_PX, HEIGHT_PX),
            }
        )
        pipeline = LoadedPipeline(FAMILIES[name](), model)
        with Engine(pipeline, model) as engine:

            def generate(level: Acceleration) -> list[GenerationResult]:
                return [
                    engine.generate(
                        GenerationParams(
                            "a red star",
                            seed,
                            num_inference_steps=steps,
                            guidance_scale=3.0,
                            acceleration=level,
                        )
                    )
                    for seed in range(images)
                ]

            exact = generate("none")
            found = {level: generate(level) for level in ("balanced", "fast")}
            lifted = pipeline.acceleration.model_copy(update={"fast_error": 1e9})
            pipeline.acceleration = lifted
            found["no threshold"] = generate("fast")
        for level, results in found.items():
            distances = [
                psnr_db(one.pixels, two.pixels) for one, two in zip(results, exact, strict=True)
            ]
            rows.append(
                {
                    "family": name,
                    "level": level,
                    "all_calls": statistics.mean(sum(one.calls) for one in exact),
                    "calls": statistics.mean(one.calls.made for one in results),
                    "psnr_to_none_db": statistics.median(distances),
                }
            )
    return rows


def show_front(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'':<24} {'calls':>5} {'images/s':>8} {'x':>5} {'to none':>14} {'to truth':>8}  marks"
    ]
    for row in rows:
        to_none = f"{row['psnr_to_none_db']:.1f} ({row['least_psnr_to_none_db']:.1f})"
        marks = ", ".join(f"{part} {share:.1%}" for part, share in row["marks"].items())
        lines.append(
            f"{row['name']:<24} {row['calls']:>5.1f} {row['images_per_s']:>8.2f} "
            f"{row['speedup']:>5.2f} {to_none:>14} {row['psnr_to_truth_db']:>8.1f}  {marks}"
        )
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the distance to the truth and to ``none`` by the number of calls."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharex=True, layout="constrained")
    sides = {"psnr_to_truth_db": "PSNR to the truth, dB", "psnr_to_none_db": "PSNR to none, dB"}
    for axis, (key, label) in zip(axes, sides.items(), strict=True):
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            solver = row["noise_scheduler"] or "fewer steps"
            extrapolated = row["name"] in ("none", "balanced", "fast")
            groups.setdefault("extrapolated" if extrapolated else solver, []).append(row)
        for (name, mine), style in zip(groups.items(), ("o-", "s:", "^:", "v:"), strict=True):
            # The image of "none" is at no distance from itself.
            shown = [row for row in mine if key == "psnr_to_truth_db" or row["name"] != "none"]
            shown.sort(key=lambda row: row["calls"])
            axis.plot(
                [row["calls"] for row in shown], [row[key] for row in shown], style, label=name
            )
        axis.set(xlabel="denoiser calls", ylabel=label)
    axes[0].legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(
    pairs: Annotated[
        int, typer.Option(help="Held-out prompts and seeds; 0 leaves out the front.")
    ] = 256,
    steps: Annotated[int, typer.Option(help="Steps of 'none' and of both levels.")] = 30,
    truth_steps: Annotated[int, typer.Option(help="Steps of the truth.")] = 200,
    clients: Annotated[int, typer.Option(help="Clients of the closed loop.")] = 8,
    together: Annotated[int, typer.Option(help="Pairs of each way in one turn.")] = 32,
    seconds: Annotated[float, typer.Option(help="Seconds of the trace of arrivals.")] = 40.0,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    seed: int = 0,
    output: Annotated[Path | None, typer.Option(help="File for the results, as JSON.")] = None,
    chart: Annotated[Path | None, typer.Option(help="File for the chart, as PNG.")] = None,
) -> None:
    """Print the tables."""
    torch.set_num_threads(threads)
    model = ModelConfig(id="demo", device="cpu")
    pipeline = LoadedPipeline.load(model)
    machine = hardware(pipeline.device)
    rows: list[dict[str, Any]] = []
    if pairs:
        drawn = held_out(pairs, seed)
        rows = front(pipeline, model, drawn, steps, truth_steps, clients, together)
        typer.echo(show_front(rows))
        if chart is not None:
            draw(rows, chart)
    traced = deadlines(pipeline, model, seconds, seed) if seconds else []
    torch.set_num_threads(threads)
    if traced:
        typer.echo(show(traced))
    tiny = families(steps, images=4)
    for row in tiny:
        typer.echo(
            f"{row['family']:<14} {row['level']:<13} {row['calls']:>5.1f} of "
            f"{row['all_calls']:>4.1f} calls, {row['psnr_to_none_db']:>6.1f} dB to none"
        )
    if output is not None:
        result = {
            "command": "python -m tests.benchmarks.extrapolation " + " ".join(sys.argv[1:]),
            "hardware": machine,
            "pairs": pairs,
            "steps": steps,
            "truth_steps": truth_steps,
            "guidance_scale": GUIDANCE,
            "clients": clients,
            "seconds": seconds,
            "slo_scale": SLO_SCALE,
            "rows": rows,
            "deadlines": [asdict(row) for row in traced],
            "families": tiny,
        }
        output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
