"""Section "steps": single denoiser calls by batch size, their rows, and their kernels.

The calls are those of different requests, merged as the engine merges them, but without it.
"""

import functools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from serve_app.engine.batching.batch import MergeableCall, prepare
from serve_app.engine.batching.rendezvous import Call
from serve_app.engine.device import is_out_of_memory
from serve_app.engine.startup.comparison import relative_l2
from serve_app.engine.startup.merging import rounding
from serve_app.engine.startup.runs import RecordedCall, Runs
from serve_app.engine.timer import wait_for_device
from tests.benchmarks.first_day.day import Day, aim
from tests.benchmarks.first_day.kernels import kernels_of
from tests.benchmarks.first_day.subject import Subject, Subjects, Target

REQUESTS = 4
"""Different requests whose calls are merged; larger batches repeat them."""

SECONDS_EACH = 1.0
"""Time for the repeats of one batch size."""

REPEATS = 3, 30
"""Least and most repeats."""

CALLS = 10
"""Calls of one batch size, if a call is so long that the least repeats are made."""


def steps(day: Day, subjects: Subjects, target: Target) -> None:
    """Write for each batch size: times, arithmetic, memory, kernels, and how far rows are off."""
    subject = subjects.get(target)
    if not subject.specs:
        raise RuntimeError("calls cannot be merged: the certificate of this model is not batched")
    with subject.runs() as runs:
        firsts = _first_calls(subject, runs)
        for batch in subject.batches:
            known = day.results.find(day.section, f"batch {batch // 2}")
            estimate_s = 5 + CALLS * 2 * known["step_ms"] / 1000 if known else 0.0
            try:
                day.row(
                    f"batch {batch}",
                    functools.partial(_batch, day, subject, runs, firsts, batch),
                    estimate_s,
                )
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                day.results.add(day.section, f"batch {batch}", {"out_of_memory": str(error)})
                return


def _first_calls(subject: Subject, runs: Runs) -> list[tuple[MergeableCall, RecordedCall]]:
    """Return a denoiser call of each request, ready to be merged, and its output alone."""
    found = []
    for seed in range(REQUESTS):
        recording = runs.alone(subject.params(seed, steps=2))
        recorded = recording.calls[0]
        call = prepare(subject.specs, recorded.call)
        if call is None:
            raise RuntimeError(f"a call of {recorded.call.site} cannot be merged")
        found.append((call, recorded))
    return found


def _batch(
    day: Day,
    subject: Subject,
    runs: Runs,
    firsts: Sequence[tuple[MergeableCall, RecordedCall]],
    batch: int,
) -> dict[str, Any]:
    singles = [firsts[index % len(firsts)] for index in range(batch)]
    calls = [call for call, _ in singles]
    spec = subject.specs[calls[0].call.site]
    merged = spec.merge(calls)
    on_cuda = subject.pipeline.device.type == "cuda"
    if on_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    outputs = spec.split(runs.rendezvous.forward(merged), calls)
    alone = max(
        relative_l2(recorded.output, output)
        for (_, recorded), output in zip(singles, outputs, strict=True)
    )
    control = 0.0
    if batch > 1:
        copies = [calls[0]] * batch
        twin = spec.split(runs.rendezvous.forward(spec.merge(copies)), copies)
        control = relative_l2(twin[0], outputs[0])
        del twin
    del outputs
    values: dict[str, Any] = {"weights": "random", **_times(runs, merged)}
    if on_cuda:
        values["more_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    values["tflop"] = _tflop(runs, merged)
    values["tflops"] = values["tflop"] / values["step_ms"] * 1000
    values |= _ratios(day, batch, values)
    values |= kernels_of(lambda: runs.rendezvous.forward(merged), subject.pipeline.device)
    limit = rounding(subject.pipeline.dtype, subject.pipeline.device)
    values |= {"control": control, "relative_l2": alone}
    met = control == 0 and alone <= limit
    return values | aim(f"control 0, relative L2 {limit:g}", met)


def _times(runs: Runs, call: Call) -> dict[str, Any]:
    """Return the median milliseconds of a call, and those until the host has launched it."""
    taken: list[float] = []
    launched: list[float] = []
    until = time.perf_counter() + SECONDS_EACH
    least, most = REPEATS
    while len(taken) < least or (len(taken) < most and time.perf_counter() < until):
        wait_for_device()
        started_at = time.perf_counter()
        runs.rendezvous.forward(call)
        launched.append(time.perf_counter() - started_at)
        wait_for_device()
        taken.append(time.perf_counter() - started_at)
    return {
        "step_ms": 1000 * statistics.median(taken),
        "launch_ms": 1000 * statistics.median(launched),
        "repeats": len(taken),
    }


def _tflop(runs: Runs, call: Call) -> float:
    """Return the operations of a call's products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        runs.rendezvous.forward(call)
    return float(counter.get_total_flops()) / 1e12


def _ratios(day: Day, batch: int, values: dict[str, Any]) -> dict[str, Any]:
    """Return the share of the device's arithmetic, and the gain over calls one at a time."""
    ceiling = day.results.find("ceilings", "matrix product")
    one = day.results.find(day.section, "batch 1")
    one_ms = values["step_ms"] if batch == 1 else one["step_ms"] if one else None
    return {
        "share_of_matrix_product": values["tflops"] / ceiling["tflops"] if ceiling else None,
        "gain_over_one": batch * one_ms / values["step_ms"] if one_ms else None,
    }
