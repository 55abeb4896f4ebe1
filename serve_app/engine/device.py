"""The device: its memory, its errors, and its name for NVIDIA's tools."""

import functools
import traceback
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import torch

from serve_app.metrics.engine import Memory

T = TypeVar("T")

_OUT_OF_MEMORY = (
    "out of memory",  # CUDA's runtime and driver, the latter for expandable segments
    "cudaErrorMemoryAllocation",
    "STATUS_ALLOC_FAILED",  # cuBLAS, cuSPARSE, cuSOLVER, and cuDNN before version 9
    "ALLOCATION_FAILED",  # cuDNN 9: of the host or of the device
    "was unable to find an engine",  # cuDNN: no algorithm has the workspace that it needs
    "NVML_SUCCESS == r INTERNAL ASSERT FAILED",  # torch, if NVML cannot name the memory in use
    "allocate memory",  # torch on a CPU, and oneDNN: it cannot, or could not
    "not enough memory",  # torch on a CPU with Windows
    "bad_alloc",
)
"""Texts of the errors by which libraries report that memory ran out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error``, or one that it followed from, says that memory ran out.

    Only torch's own allocator raises `torch.OutOfMemoryError`. Other libraries allocate as well,
    and torch passes on what they report as a `RuntimeError` or a `torch.AcceleratorError`.
    """
    return any(map(_says_out_of_memory, _chain(error)))


def check_device(error: BaseException) -> None:
    """Raise ``error`` if it means that this process can no longer use its device.

    After such a CUDA error every later call fails as well. The engine stops, its health check
    reports that, and Serve replaces the process. Running out of memory is not such an error.
    """
    for one in _chain(error):
        if isinstance(one, torch.AcceleratorError) and not _says_out_of_memory(one):
            raise error


def _says_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that it followed from, as a traceback prints them."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)


def clear_frames(error: BaseException) -> None:
    """Drop the tensors that the frames of a handled error hold."""
    for one in _chain(error):
        traceback.clear_frames(one.__traceback__)


def release(error: BaseException) -> None:
    """Drop the traceback of a handled error, and the tensors that its frames hold."""
    clear_frames(error)
    for one in _chain(error):
        one.__traceback__ = None


def free_memory() -> None:
    """Return memory that torch keeps for later calls to the device."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class MemoryMeter(Protocol):
    """Reader of the memory that calls take. Used by the engine's thread only."""

    def available(self) -> int:
        """Return the bytes that a call may take: free ones, and those that torch keeps."""
        ...

    def measure(self, call: Callable[[], T]) -> tuple[T, int]:
        """Return ``call()``, and the most bytes that it took beside what was there before."""
        ...


class GpuMemoryMeter:
    """Meter of one GPU, by the statistics of torch's allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def available(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._device)
        kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return free + kept

    def measure(self, call: Callable[[], T]) -> tuple[T, int]:
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        result = call()
        return result, torch.cuda.max_memory_allocated(self._device) - before


def memory_meter(device: torch.device) -> MemoryMeter | None:
    """Return a meter of the memory that calls take; ``None`` for a CPU."""
    return GpuMemoryMeter(device) if device.type == "cuda" else None


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
