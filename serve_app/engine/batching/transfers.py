"""Copies to the device that do not wait for it.

torch copies from pageable memory only after everything that the device was asked for, and the host
waits for that. From pinned memory it need not wait. Stock pipelines make such copies at each step:
noise that a generator on the CPU draws, timesteps, and constants of a noise scheduler.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from serve_app.engine.batching.axis import map_tensors, tensors

_MOST = 2**26
"""Bytes of a tensor that is worth pinning. Larger ones, such as weights, wait for memory anyway."""


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy a tensor of the CPU to a device, without waiting for the device."""
    # Converted here: torch would convert into memory that is not pinned.
    pinned = torch.empty_like(tensor, dtype=dtype, pin_memory=True).copy_(tensor)
    return pinned.to(device, non_blocking=True)  # torch keeps the memory until it is copied


def on_one_device(arguments: Any) -> Any:
    """Return arguments of a network with their tensors of the CPU on the device of the others.

    Noise schedulers keep timesteps on the CPU, where their values decide what to do.
    """
    device = next((one.device for one in tensors(arguments) if not one.is_cpu), None)
    if device is None or all(not one.is_cpu for one in tensors(arguments)):
        return arguments
    return map_tensors(lambda one: to_device(one, device) if one.is_cpu else one, arguments)


class Reading:
    """A number that the device computes, copied to the host without waiting for it.

    It begins at once, and any thread may take the value.
    """

    def __init__(self, number: Tensor) -> None:
        """Launch the copy of a tensor of one number."""
        ahead = not number.is_cpu
        self._number = number.to("cpu", non_blocking=ahead)
        self._copied = torch.cuda.Event() if ahead else None
        if self._copied is not None:
            self._copied.record()

    def value(self) -> float:
        """Wait until the device has computed the number, and for nothing after it."""
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._number)


class NonBlockingCopies(TorchFunctionMode):
    """Replaces operations that wait for a device by equal ones that do not wait.

    Only copies to a device, and operations that wait to raise an error: `FiniteCheck` finds those
    too. Active on one thread. It costs about a microsecond for each operation of torch.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _REPLACED.get(function, function)(*args, **(kwargs or {}))


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    known = kwargs.keys() <= {"device", "dtype", "non_blocking"}
    if not (tensor.is_cpu and tensor.layout is torch.strided and tensor.nbytes <= _MOST and known):
        return tensor.to(*args, **kwargs)
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for value in args:
        if isinstance(value, Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, torch.device | str | int) and not isinstance(value, bool):
            device = value
    if device is None or torch.device(device).type == "cpu":
        return tensor.to(*args, **kwargs)
    return to_device(tensor, torch.device(device), dtype)


def _created(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def created(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or isinstance(data, Tensor):
            return create(data, *args, device=device, **kwargs)
        return _to(create(data, *args, **kwargs), device)

    return created


def _getitem(tensor: Tensor, index: Any) -> Tensor:
    if tensor.is_cpu:
        return tensor[index]
    parts = index if isinstance(index, tuple) else (index,)
    moved = tuple(_index_on(tensor.device, part) for part in parts)
    return tensor[moved if isinstance(index, tuple) else moved[0]]


def _index_on(device: torch.device, index: Any) -> Any:
    """Return a part of an index on the device, if it is a list of numbers or a tensor."""
    if isinstance(index, list) and index and all(type(one) is int for one in index):
        return to_device(torch.tensor(index), device)
    if isinstance(index, Tensor) and index.is_cpu and index.ndim and index.dtype != torch.bool:
        return to_device(index, device)
    return index


def _solve(matrix: Tensor, values: Tensor, *, left: bool = True, **kwargs: Any) -> Tensor:
    if matrix.is_cpu or kwargs:
        solved: Tensor = torch.linalg.solve(matrix, values, left=left, **kwargs)
    else:
        solved = torch.linalg.solve_ex(matrix, values, left=left).result
    return solved


_REPLACED: dict[Any, Callable[..., Tensor]] = {
    Tensor.to: _to,
    Tensor.__getitem__: _getitem,
    torch.as_tensor: _created(torch.as_tensor),
    torch.linalg.solve: _solve,
    torch.tensor: _created(torch.tensor),
}
