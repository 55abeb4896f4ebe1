"""Section "images": the stock pipeline one at a time against the engine with requests at once."""

import functools
import queue
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from serve_app.engine.batching.rendezvous import Job, Rendezvous
from serve_app.engine.engine import Engine
from serve_app.engine.startup.comparison import psnr_db
from serve_app.engine.timer import wait_for_device
from serve_app.protocol.events import Completed, Event, Failed
from serve_app.protocol.params import GenerationParams
from tests.benchmarks.aims import EFFICIENCIES, SPEEDUPS, WAITING
from tests.benchmarks.efficiency import BareCalls
from tests.benchmarks.first_day.day import Day, NoAnswer, aim
from tests.benchmarks.first_day.subject import Subject, Subjects, Target
from tests.benchmarks.stopwatch import Place, Stopwatch
from tests.benchmarks.ways import Arrival, Kind, generate_whole

ENGINE_MS = 0.3
"""Target: milliseconds of the engine's own work for one step of one request."""

LONGEST_S = 120.0
"""Longest time until the next image."""

PLACES: list[Place] = [
    (Rendezvous, "forward", "launch"),
    (torch.cuda.Event, "synchronize", "wait"),
    (Job, "start", "pipeline"),
    (Job, "resume", "pipeline"),
]
"""Where the engine's thread spends its time; the rest is the engine's own work."""


@dataclass(frozen=True)
class Wave:
    """Requests that arrived at once."""

    took_s: float
    """Seconds until the last image is on the host."""
    sent_s: float
    """Seconds until the engine sent the last event."""
    images: dict[int, Tensor]
    """Images by seed, on the host."""
    mean_batch: float


def wave(engine: Engine, requests: Sequence[GenerationParams]) -> Wave:
    """Submit all requests, and wait for all images.

    Raises:
        DiffusionServeError: a request failed.
        NoAnswer: no request ended for long.
    """
    ends: queue.SimpleQueue[tuple[GenerationParams, Completed | Failed]] = queue.SimpleQueue()
    before = engine.stats()

    def submit(params: GenerationParams) -> None:
        def on_event(event: Event) -> None:
            if isinstance(event, Completed | Failed):
                ends.put((params, event))

        engine.submit(params, on_event)

    started_at = time.perf_counter()
    for params in requests:
        submit(params)
    images, sent_s = {}, 0.0
    for _ in requests:
        try:
            params, event = ends.get(timeout=LONGEST_S)
        except queue.Empty:
            raise NoAnswer(f"no image for {LONGEST_S:.0f} s") from None
        sent_s = time.perf_counter() - started_at
        if isinstance(event, Failed):
            raise event.error
        assert params.seed is not None
        images[params.seed] = event.result.pixels.cpu()
    after = engine.stats()
    calls = max(1, after.denoiser_calls - before.denoiser_calls)
    return Wave(
        time.perf_counter() - started_at, sent_s, images, (after.steps - before.steps) / calls
    )


@contextmanager
def capped(engine: Engine, side: int, cap: int) -> Iterator[None]:
    """Fill batches up to ``cap`` inside the block, whether or not they are worthwhile."""
    size = side, side
    usual = engine.cost.caps.get(size)
    engine.cost.caps[size] = cap
    try:
        yield
    finally:
        if usual is None:
            del engine.cost.caps[size]
        else:
            engine.cost.caps[size] = usual


def images(day: Day, subjects: Subjects, target: Target) -> None:
    """Write the images per second of each way, the distances, and where the time goes."""
    subject = subjects.get(target)
    step = day.results.find(subject.target.name + ": steps", "batch 1")
    image_s = (step["step_ms"] / 1000 if step else 0.0) * subject.steps * 1.3
    few, most = len(_seeds(subject)), max(subject.waiting)
    day.row("stock, one at a time", lambda: _stock(subject), image_s * few)
    day.row(f"stock, list of {few}", lambda: _whole(subject, few), image_s * few)
    for count in subject.waiting:
        day.row(
            f"engine, {count} at once",
            functools.partial(_engine, day, subject, count, cap=count),
            1.3 * image_s * count,
        )
    usual = subject.engine.cost.cap((subject.side, subject.side))
    if usual < most:
        day.row(
            f"engine, {most} at once, its own cap",
            lambda: _engine(day, subject, most, cap=usual),
            1.3 * image_s * most,
        )
    day.row("efficiency", lambda: _efficiency(subject, few), 3 * image_s * few)


def _seeds(subject: Subject) -> range:
    return range(min(max(subject.waiting), subject.target.alone))


def alone(subject: Subject, seed: int) -> Tensor:
    """Return the stock pipeline's image of a seed, on the host; generated once."""
    if seed not in subject.alone:
        subject.alone[seed] = subject.pipeline.generate(subject.params(seed))[0].cpu()
    return subject.alone[seed]


def _stock(subject: Subject) -> dict[str, Any]:
    subject.pipeline.generate(subject.params(0, steps=2)).cpu()  # warms up
    taken = []
    for seed in _seeds(subject):
        started_at = time.perf_counter()
        subject.alone.pop(seed, None)
        alone(subject, seed)
        taken.append(time.perf_counter() - started_at)
    found = list(subject.alone.values())
    others = [psnr_db(found[0], other) for other in found[1:]]
    return {
        "weights": "random",
        "steps": subject.steps,
        "images": len(taken),
        "images_per_s": len(taken) / sum(taken),
        "image_s": statistics.median(taken),
        "psnr_of_other_seeds_db": max(others) if others else None,
    }


def _whole(subject: Subject, count: int) -> dict[str, Any]:
    """Measure the floor: the stock pipeline with a list of prompts."""
    kind = Kind(subject.side, subject.side, subject.steps, 1.0)
    started_at = time.perf_counter()
    generate_whole(subject.pipeline, [Arrival(0.0, kind, seed) for seed in range(count)])
    took_s = time.perf_counter() - started_at
    return {"weights": "random", "steps": subject.steps, "images_per_s": count / took_s}


def _engine(day: Day, subject: Subject, count: int, cap: int) -> dict[str, Any]:
    engine = subject.engine
    with capped(engine, subject.side, cap):
        wave(engine, [subject.params(seed, steps=2) for seed in range(count)])  # warms up
        stopwatch = Stopwatch(thread="engine")
        with stopwatch.watching(PLACES):
            found = wave(engine, [subject.params(seed) for seed in range(count)])
    parts = stopwatch.spent_ms()
    own_ms = 1000 * found.sent_s - sum(parts.values())
    request_steps = count * subject.steps
    worst = min(
        psnr_db(alone(subject, seed), found.images[seed])
        for seed in range(count)
        if seed in _seeds(subject)
    )
    stock = day.results.find(day.section, "stock, one at a time")
    rate = count / found.took_s
    call = day.results.find(f"{subject.target.name}: steps", f"batch {cap}")
    calls = subject.steps * count / cap
    values: dict[str, Any] = {
        "weights": "random",
        "steps": subject.steps,
        "cap": cap,
        "mean_batch": found.mean_batch,
        "images_per_s": rate,
        "over_stock": rate / stock["images_per_s"] if stock else None,
        "share_of_bare_steps": calls * call["step_ms"] / 1000 / found.took_s if call else None,
        "psnr_db": worst,
        **{f"{name}_ms_per_request_step": spent / request_steps for name, spent in parts.items()},
        "engine_ms_per_request_step": own_ms / request_steps,
    }
    target = subject.target
    least = SPEEDUPS.get((target.model, target.side, target.steps))
    if least is not None and count == WAITING:
        over = values["over_stock"]
        return values | aim(f"{least:g} times stock", over is not None and over >= least)
    return values | aim(
        f"{ENGINE_MS:g} ms of the engine for a step of a request",
        values["engine_ms_per_request_step"] <= ENGINE_MS,
    )


def _efficiency(subject: Subject, count: int) -> dict[str, Any]:
    """Compare the engine's time with that of its calls on their own, the VAE's among them."""
    steps = 3 if subject.rehearsal else subject.target.efficiency_steps
    requests = [subject.params(seed, steps) for seed in range(count)]
    short = [subject.params(seed, 2) for seed in range(count)]
    calls = BareCalls(subject.pipeline)
    with capped(subject.engine, subject.side, count), calls.noted():
        wave(subject.engine, short)  # warms up
        calls.counts.clear()
        found = wave(subject.engine, requests)
    wait_for_device()
    bare_s = calls.seconds()
    efficiency = sum(bare_s.values()) / found.took_s
    target = subject.target
    least = EFFICIENCIES.get((target.model, target.side, target.efficiency_steps))
    values = {
        "weights": "random",
        "steps": steps,
        "waiting": count,
        "mean_batch": found.mean_batch,
        "took_s": found.took_s,
        "bare_s": bare_s,
        "efficiency": efficiency,
    }
    return values if least is None else values | aim(f"at least {least:g}", efficiency >= least)
