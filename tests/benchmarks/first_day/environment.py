"""Sections "environment" and "ceilings": the machine, and the most that its GPU gives."""

import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from serve_app import __version__
from serve_app.engine.timer import wait_for_device
from tests.benchmarks.first_day.day import Day

PACKAGES = (
    *("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy"),
    *("greenlet", "pydantic", "huggingface_hub", "triton", "torchao"),
)

GPU_FIELDS = (
    *("name", "driver_version", "memory.total", "memory.used", "power.limit", "temperature.gpu"),
    *("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "pstate", "mig.mode.current"),
)
"""What nvidia-smi is asked; it answers "[N/A]" where it cannot."""


def environment(day: Day) -> None:
    """Write the versions, the host and the GPU."""
    day.row("software", _software)
    day.row("host", _host)
    if day.device.type == "cuda":
        day.row("GPU", _gpu)


def _software() -> dict[str, Any]:
    found = {"python": platform.python_version(), "diffusion-serve": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found | {"torch's CUDA": str(torch.version.cuda)}


def _host() -> dict[str, Any]:
    compilers = [name for name in ("g++", "gcc", "clang++", "nvcc") if shutil.which(name)]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "compilers": " ".join(compilers) or "none",
        "kernel": platform.release(),
    }


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": properties.total_memory / 2**30,
        "cudnn": torch.backends.cudnn.version(),
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
        "nvidia-smi": _nvidia_smi(),
    }


def _nvidia_smi() -> dict[str, str] | str:
    query = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"not readable: {error}"
    values = answer.stdout.splitlines()[0].split(", ")
    return dict(zip(GPU_FIELDS, values, strict=False))


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median seconds of a call on the device, after one that is not counted."""
    call()
    taken: list[float] = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1000)
        else:
            started_at = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started_at)
    return statistics.median(taken)


def ceilings(day: Day) -> None:
    """Write what the device gives at most: arithmetic, copies, launches."""
    side, mib, tokens = (1024, 16, 512) if day.rehearsal else (8192, 4096, 4608)
    day.row("matrix product", lambda: _matmul(day, side))
    day.row("copy", lambda: _copy(day, mib))
    day.row("attention", lambda: _attention(day, tokens))
    day.row("small kernels", lambda: _launches(day))


def _matmul(day: Day, side: int) -> dict[str, Any]:
    # Random numbers: with zeros the clock of a GPU, and so the rate, is higher.
    a, b = (torch.randn(side, side, device=day.device, dtype=day.dtype) for _ in range(2))
    seconds = seconds_of(lambda: a @ b, day.device, 10)
    return {
        "side": side,
        "dtype": str(day.dtype),
        "ms": 1000 * seconds,
        "tflops": 2 * side**3 / seconds / 1e12,
    }


def _copy(day: Day, mib: int) -> dict[str, Any]:
    source = torch.empty(mib * 2**20, dtype=torch.uint8, device=day.device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), day.device, 10)
    return {"mib": mib, "ms": 1000 * seconds, "gb_per_s": 2 * mib * 2**20 / seconds / 1e9}


def _attention(day: Day, tokens: int) -> dict[str, Any]:
    """Measure torch's attention at the shape of FLUX.1 at 1024x1024."""
    heads, width = 24, 128
    shape = 1, heads, tokens, width
    q, k, v = (torch.randn(shape, device=day.device, dtype=day.dtype) for _ in range(3))
    seconds = seconds_of(lambda: scaled_dot_product_attention(q, k, v), day.device, 10)
    return {
        "tokens": tokens,
        "ms": 1000 * seconds,
        "tflops": 4 * heads * width * tokens**2 / seconds / 1e12,
    }


def _launches(day: Day, count: int = 1000) -> dict[str, Any]:
    """Measure kernels that do nothing to speak of: the host's time, and the device's."""
    small = torch.zeros(8, device=day.device)
    small.add_(1)
    wait_for_device()
    started_at = time.perf_counter()
    for _ in range(count):
        small.add_(1)
    launched_s = time.perf_counter() - started_at
    wait_for_device()
    ended_s = time.perf_counter() - started_at
    started_at = time.perf_counter()
    for _ in range(100):
        small.add_(1)
        wait_for_device()
    alone_s = time.perf_counter() - started_at
    return {
        "host_us_each": 1e6 * launched_s / count,
        "device_us_each": 1e6 * ended_s / count,
        "launch_and_wait_us": 1e4 * alone_s,
    }
