"""The device: its memory, its errors, and its name for NVIDIA's tools."""

import functools
import traceback
from collections.abc import Callable

import torch

from serve_app.engine.metrics import Memory


def check_device(error: BaseException) -> None:
    """Raise ``error`` if it means that this process can no longer use its device.

    After such a CUDA error every later call fails as well. The engine stops, its health check
    reports that, and Serve replaces the process. Running out of memory is not such an error.
    """
    if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError):
        raise error


def release(error: BaseException) -> None:
    """Drop the traceback of a handled error, and the tensors that its frames hold."""
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = None


def free_memory() -> None:
    """Return memory that torch keeps for later calls to the device."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def gpu_uuid(device: torch.device) -> str:
    """Return the UUID of a GPU as NVIDIA's tools print it; an empty string for a CPU."""
    if device.type != "cuda":
        return ""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def memory_reader(device: torch.device) -> Callable[[Memory], int] | None:
    """Return a function that reads the memory of a GPU, in bytes; ``None`` for a CPU."""
    return functools.partial(_memory_bytes, device) if device.type == "cuda" else None


def _memory_bytes(device: torch.device, kind: Memory) -> int:
    if kind == "used":
        return torch.cuda.memory_allocated(device)
    if kind == "reserved":
        return torch.cuda.memory_reserved(device)
    free, total = torch.cuda.mem_get_info(device)
    return free if kind == "free" else total
