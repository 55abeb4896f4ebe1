"""Section "host": does the GPU ever wait? Its busy share, and calls that make the host wait."""

import functools
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.first_day.day import Day, aim
from tests.benchmarks.first_day.images import capped, wave
from tests.benchmarks.first_day.kernels import busy_ms, profiled
from tests.benchmarks.first_day.subject import Subject, Subjects, Target

STEPS = 8

MOST_PLACES = 5
"""Places of waits that are named."""


def host(day: Day, subjects: Subjects, target: Target) -> None:
    """Write the GPU's busy share by batch size, and the waits with each noise scheduler."""
    subject = subjects.get(target)
    for count in subject.waiting:
        day.row(f"busy, {count} at once", functools.partial(_busy, subject, count), 10.0)
    if day.device.type != "cuda":
        day.row("waits", lambda: {"not measured": "only CUDA reports them"})
        return
    # One model tells of the noise schedulers: the same classes run in all UNet families.
    others = subject.engine.info.noise_schedulers if target.model == "sd15" else ()
    for name in (None, *others):
        label = name or "the model's own"
        day.row(f"waits, {label}", functools.partial(_waits, subject, name), 5.0)


def _busy(subject: Subject, count: int) -> dict[str, Any]:
    """Return the share of the time in which at least one kernel ran, by the GPU's own clock."""
    engine = subject.engine
    requests = [subject.params(seed, steps=STEPS) for seed in range(count)]
    with capped(engine, subject.side, count):
        wave(engine, [subject.params(seed, steps=2) for seed in range(count)])  # warms up
        spans = profiled(lambda: wave(engine, requests), subject.pipeline.device)
    if not spans:
        return {"not measured": "the profiler saw no kernel"}
    whole_ms = max(end for _, end, _ in spans) - min(start for start, _, _ in spans)
    idle_ms = gaps(spans)
    return {
        "weights": "random",
        "steps": STEPS,
        "kernels": len(spans),
        "busy_share": busy_ms(spans) / whole_ms,
        "longest_gaps_ms": [round(gap, 3) for gap in idle_ms[:3]],
        "gaps_over_50_us": sum(gap > 0.05 for gap in idle_ms),
    }


def gaps(spans: Sequence[tuple[float, float, str]]) -> list[float]:
    """Return the times without a kernel, in milliseconds, the longest first."""
    gaps, until = [], None
    for start, end, _ in sorted(spans):
        if until is not None and start > until:
            gaps.append(start - until)
        until = end if until is None else max(until, end)
    return sorted(gaps, reverse=True)


@contextmanager
def _noticed() -> Iterator[Counter[str]]:
    """Count the calls inside the block that make the host wait for the GPU, by their place."""
    places: Counter[str] = Counter()

    def note(message: Any, category: Any, filename: str, lineno: int, *_: Any, **__: Any) -> None:
        if "called a synchronizing CUDA operation" in str(message):
            places["/".join(Path(filename).parts[-2:]) + f":{lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # restored by the block
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _waits(subject: Subject, noise_scheduler: str | None) -> dict[str, Any]:
    """Count the waits of two lengths of a request: their difference is that of the steps alone."""
    counts = []
    for steps in (STEPS, 2 * STEPS):
        params = subject.params(0, steps)
        if noise_scheduler is not None:
            params = replace(params, noise_scheduler=noise_scheduler)
        with _noticed() as places:
            wave(subject.engine, [params])
        counts.append(places)
    short, long = counts
    steps_only = long - short
    per_step = steps_only.total() / STEPS
    return {
        "waits_per_request": short.total() - STEPS * per_step,
        "waits_per_step": per_step,
        "places": dict(steps_only.most_common(MOST_PLACES)),
        **aim("no wait between steps", per_step == 0),
    }
