"""The kernels of a call, from torch's profiler: how many, and how long each kind takes."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from serve_app.engine.timer import wait_for_device
from tests.benchmarks.efficiency import busy_s

MOST = 6
"""Kinds of kernels that are named."""

Spans = list[tuple[float, float, str]]
"""Start, end, both in milliseconds, and name."""


def profiled(run: Callable[[], object], device: torch.device) -> Spans:
    """Run, and return the spans of all kernels; on a CPU, of all operators."""
    on_cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
    kind = DeviceType.CUDA if on_cuda else DeviceType.CPU
    with profile(activities=[activity], acc_events=True) as profiler:
        run()
        wait_for_device()
    return [
        (event.time_range.start / 1000, event.time_range.end / 1000, event.name)
        for event in profiler.events()
        if event.device_type == kind
    ]


def busy_ms(spans: Iterable[tuple[float, float, str]]) -> float:
    """Return how long at least one kernel ran."""
    return busy_s((start, end) for start, end, _ in spans)


def kernels_of(run: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Return the columns about the kernels of a call."""
    spans = profiled(run, device)
    taken: dict[str, float] = {}
    for start, end, name in spans:
        taken[name[:80]] = taken.get(name[:80], 0.0) + end - start
    longest = sorted(taken.items(), key=lambda item: -item[1])[:MOST]
    return {
        "kernels": len(spans),
        "kernel_ms": busy_ms(spans),
        "longest_ms": {name: round(spent, 3) for name, spent in longest},
    }
