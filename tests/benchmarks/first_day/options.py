"""Sections "compile" and "CUDA graphs": the same requests with an option of `model.speed`."""

import functools
import time
from dataclasses import replace
from typing import Any

from serve_app.config.speed import SpeedConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.networks import denoisers_of
from serve_app.engine.model.speed import speed_up
from serve_app.engine.startup.comparison import psnr_db
from tests.benchmarks.first_day.day import Day
from tests.benchmarks.first_day.images import alone, capped, wave
from tests.benchmarks.first_day.subject import Subject, Subjects, Target

BATCHES = (1, 2)
"""Batch sizes with the option. Each one is compiled, so there are few."""

NEED_GPU = {"cuda_graphs"}
"""Options that a CPU rejects."""


def option(day: Day, subjects: Subjects, target: Target, speed: dict[str, Any]) -> None:
    """Write the start and the images with the option, beside those without it.

    Both models are loaded, and take turns.
    """
    name = ", ".join(speed)
    if day.device.type == "cpu" and speed.keys() & NEED_GPU:
        day.row("option", lambda: {"not measured": "needs a GPU"})
        return
    small = replace(target, batches=BATCHES, waiting=BATCHES)
    plain = subjects.get(small)
    stock = subjects.build(target.model)
    model = plain.model.model_copy(update={"speed": SpeedConfig.model_validate(speed)})
    speed_up(stock, denoisers_of(stock), model.speed, day.device)
    changed = subjects.subject(small, stock, model)
    changed.profile = changed.profile.with_suffix(f".{name}.json")
    started_at = time.perf_counter()
    with changed.start_engine() as engine:
        took_s = time.perf_counter() - started_at
        phases = {f"{phase}_s": spent for phase, spent in engine.cold_start.phases_s.items()}
        day.row("start", lambda: {"weights": "random", "took_s": took_s, **phases})
        for count in BATCHES:
            row = f"engine, {count} at once"
            day.row(row, functools.partial(_compared, plain, engine, count), 5.0)


def _compared(plain: Subject, engine: Engine, count: int) -> dict[str, Any]:
    """Measure both engines in turns."""
    requests = [plain.params(seed) for seed in range(count)]
    taken: dict[Engine, list[float]] = {engine: [], plain.engine: []}
    worst = None
    for _ in range(2):
        for one in taken:
            with capped(one, plain.side, count):
                found = wave(one, requests)
            taken[one].append(found.took_s)
            if one is engine:
                worst = min(
                    psnr_db(alone(plain, seed), found.images[seed]) for seed in range(count)
                )
    with_s, without_s = (min(times) for times in taken.values())
    return {
        "weights": "random",
        "steps": plain.steps,
        "images_per_s": count / with_s,
        "without_images_per_s": count / without_s,
        "times_as_fast": without_s / with_s,
        "psnr_db": worst,
    }
