"""A CPU that torch takes for an asynchronous accelerator, and that notes what waits for it.

Tensors on the device hold their values in the memory of the CPU, so whole pipelines run on it and
give their usual images. Each operation that would make the CPU wait for a CUDA device is noted, as
`torch.cuda.set_sync_debug_mode` would report it: `known_waits` lists what that is, and `tests/gpu`
runs the same list on a GPU. Time is simulated: calls that are launched take seconds of the device,
and only waiting for the device, and the work of the host, let time pass.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "asyncdevice"
"""Type of the device, as `torch.device` knows it."""

aten = torch.ops.aten

_WAITING = frozenset(
    {
        "aten::_local_scalar_dense",  # item(), bool(), int(), float()
        "aten::_linalg_check_errors",  # of torch.linalg.solve, inv and others
        "aten::_unique2",
        "aten::bincount",
        "aten::equal",
        "aten::masked_select",
        "aten::nonzero",
        "aten::repeat_interleave",
        "aten::unique_consecutive",
        "aten::unique_dim",
    }
)
"""Operations whose result on a device decides what the CPU does next."""

_INDEXING = frozenset(
    {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}
)

_JOINING = frozenset({"aten::cat", "aten::stack"})
"""Operations that take no scalar of the CPU among tensors of a device."""


class DeviceTensor(Tensor):
    """A tensor on the device."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "DeviceTensor":
        made: DeviceTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device(NAME, 0),
        )
        made.values = values
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch's own refuses subclasses

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _device().run(operation, args, kwargs or {})


@dataclass
class AsyncDevice:
    """The device, and a simulated clock of the host. One at a time, see `async_device`."""

    launch_s: float = 1e-5
    """Seconds that the host spends on each operation that it launches on the device."""
    compute_s: float = 2e-6
    """Seconds that the host spends on an operation of its own, such as one with a scalar."""
    call_s: float = 0.0
    """Seconds of a call of a network, for `device_of_engines`."""
    waits: list[str] = field(default_factory=list)
    """Operations that waited for the device, with the line of the program."""
    log: list[str] = field(default_factory=list)
    """``waits``, and whatever a test adds, in order."""
    busy_s: float = 0.0
    """Seconds of all calls that were launched."""
    _worked_s: float = 0.0
    _waited_s: float = 0.0
    _free_at: float = 0.0
    _pinned: dict[int, StorageWeakRef] = field(default_factory=dict)

    # ---- time ------------------------------------------------------------------------------------

    def now(self) -> float:
        """Return the time of the host."""
        return self._worked_s + self._waited_s

    def work(self, seconds: float) -> None:
        """Let the host work for so long."""
        self._worked_s += seconds

    def launch(self, seconds: float) -> None:
        """Add a call that keeps the device busy for so long. Does not wait for it."""
        self._free_at = max(self._free_at, self.now()) + seconds
        self.busy_s += seconds

    def wait(self, until: float | None = None) -> None:
        """Let the host wait until a time, or until the device has done everything."""
        self._waited_s += max(0.0, (self._free_at if until is None else until) - self.now())

    def new_event(self, *_: Any, **__: Any) -> "Event":
        """Return an event, as `torch.cuda.Event` does."""
        return Event(self)

    @property
    def free_at(self) -> float:
        """The time at which the device will have done everything that was launched."""
        return max(self._free_at, self.now())

    # ---- tensors ---------------------------------------------------------------------------------

    def place(self, module: nn.Module) -> None:
        """Move the weights of a network to the device."""
        for part in module.modules():
            for name, weights in part._parameters.items():
                if weights is not None:
                    values = DeviceTensor(weights.detach())
                    part._parameters[name] = nn.Parameter(values, requires_grad=False)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = DeviceTensor(buffer)

    @contextlib.contextmanager
    def used_here(self) -> Iterator[None]:
        """Let this thread create tensors on the device."""
        with _Mode(self):
            yield

    # ---- operations ------------------------------------------------------------------------------

    def run(self, operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one operation of torch, and note whether it would wait."""
        name = operation._schema.name
        given = list(_tensors((*args, *kwargs.values())))
        on_device = [value for value in given if isinstance(value, DeviceTensor)]
        there = bool(on_device) or _is_here(kwargs.get("device"))
        self.work(self.launch_s if there else self.compute_s)
        if operation is aten.is_pinned.default:
            return self._is_pinned(args[0])
        if operation is aten._pin_memory.default:
            return self._pin(args[0].clone())
        if operation is aten._to_copy.default:
            return self._to_copy(*args, **kwargs)
        if name == "aten::copy_":
            return self._copy(*args, **kwargs)
        if on_device and name in _WAITING and not kwargs.get("output_size"):
            self._note(name)
        if name in _INDEXING:
            self._check_index(name, args)
        elif on_device:
            self._check_devices(name, given)
        pinned, target = kwargs.pop("pin_memory", False), kwargs.get("device")
        if target is not None:
            kwargs = kwargs | {"device": "cpu"}
        plain = {key: _changed(_values, value) for key, value in kwargs.items()}
        output = operation(*_changed(_values, args), **plain)
        if pinned:
            return self._pin(output)
        placed = bool(on_device) if target is None else _is_here(target)
        same = {id(value.values): value for value in on_device}
        return _changed(lambda value: _wrapped(value, same), output) if placed else output

    def _to_copy(self, source: Tensor, **kwargs: Any) -> Tensor:
        target = torch.device(kwargs.pop("device", None) or source.device)
        kwargs.pop("pin_memory", None)
        non_blocking = kwargs.pop("non_blocking", False)
        if (target.type == NAME) != isinstance(source, DeviceTensor):
            self._check_copy(target, source, non_blocking)
        copied: Tensor = aten._to_copy.default(_values(source), **kwargs)
        if target.type == NAME:
            return DeviceTensor(copied)
        return self._pin(copied) if non_blocking and isinstance(source, DeviceTensor) else copied

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if target.device.type != source.device.type:
            self._check_copy(
                target.device,
                source,
                non_blocking
                and not (isinstance(source, DeviceTensor) and not self._is_pinned(target)),
            )
        aten.copy_.default(_values(target), _values(source))
        return target

    def _check_copy(self, target: torch.device, source: Tensor, non_blocking: bool) -> None:
        """Note a copy that waits: a blocking one, or one from memory that is not pinned."""
        if target.type != NAME:
            if not non_blocking:
                self._note("a copy from the device")
        elif not (non_blocking and self._is_pinned(source)):
            self._note("a copy to the device")

    def _check_index(self, name: str, args: Any) -> None:
        """Note indices that are moved to the other device, and masks, whose length is unknown."""
        target, indices = args[0], [index for index in args[1] if index is not None]
        values = args[2:3] if len(args) > 2 else ()
        on_device = isinstance(target, DeviceTensor)
        if not on_device and any(isinstance(value, DeviceTensor) for value in values):
            raise _mixed(name)
        for index in indices:
            if isinstance(index, DeviceTensor) != on_device:
                self._note(f"{name} with an index of the other device")
            elif on_device and index.dtype in (torch.bool, torch.uint8):
                self._note(f"{name} with a mask")
        for value in values:
            if on_device and isinstance(value, Tensor) and not isinstance(value, DeviceTensor):
                if value.ndim:
                    raise _mixed(name)
                self._note(f"{name} with a value of the CPU")

    def _check_devices(self, name: str, given: list[Tensor]) -> None:
        """Raise as torch does if devices are mixed. Scalars of the CPU may be among the others."""
        for value in given:
            if not isinstance(value, DeviceTensor) and (value.ndim or name in _JOINING):
                raise _mixed(name)

    def _pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        if isinstance(tensor, DeviceTensor):
            return False
        known = self._pinned.get(tensor.untyped_storage()._cdata)
        return known is not None and not known.expired()

    def _note(self, what: str) -> None:
        frame = sys._getframe()
        while frame.f_back and _is_torchs(frame.f_code.co_filename):
            frame = frame.f_back
        self.waits.append(f"{what} at {frame.f_code.co_filename}:{frame.f_lineno}")
        self.log.append(f"wait: {self.waits[-1]}")
        self.wait()


@dataclass
class Event:
    """An event of the device, with what `torch.cuda.Event` offers."""

    device: AsyncDevice
    at: float | None = None
    """Time at which the device reaches it."""

    def record(self) -> None:
        self.at = self.device.free_at

    def query(self) -> bool:
        return self.at is None or self.device.now() >= self.at - 1e-9  # a sum of floats

    def synchronize(self) -> None:
        if self.at is not None:
            self.device.wait(self.at)

    def elapsed_time(self, end: "Event") -> float:
        """Return the milliseconds between two events; raise as CUDA does before they are done."""
        if not (self.query() and end.query()):
            raise RuntimeError("an event is not done")
        assert self.at is not None
        assert end.at is not None
        return 1000 * (end.at - self.at)


class _Mode(TorchDispatchMode):
    """Lets the device run operations without a tensor of it, such as factories and copies to it."""

    def __init__(self, device: AsyncDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self._device.run(operation, args, kwargs or {})


def _is_here(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _is_torchs(filename: str) -> bool:
    return "/torch/" in filename or filename == __file__


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _changed(change: Callable[[Any], Any], value: Any) -> Any:
    """Change each value of an operation. With torch's `tree_map`, tests took a quarter longer."""
    if isinstance(value, list | tuple):
        return type(value)([_changed(change, one) for one in value])
    return change(value)


def _values(value: Any) -> Any:
    return value.values if isinstance(value, DeviceTensor) else value


def _wrapped(value: Any, same: dict[int, DeviceTensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    known = same.get(id(value))
    return DeviceTensor(value) if known is None else known


def _mixed(name: str) -> RuntimeError:
    return RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 "
        f"and cpu! (when running {name})"
    )


# ---- torch's registration: once in a process -----------------------------------------------------

_active: list[AsyncDevice] = []
_registered: list[torch.library.Library] = []


def _device() -> AsyncDevice:
    assert _active, "a tensor of the device outlived it"
    return _active[-1]


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    """Tells torch that the device is there, as long as a test uses it."""

    def is_available(self) -> bool:
        return bool(_active)

    def has_primary_context(self, _: int) -> bool:
        return bool(_active)

    def is_built(self) -> bool:
        return True


def _register() -> None:
    if _registered:
        return
    backend_registration._setup_privateuseone_for_python_backend(NAME, hook=_Hooks())
    library = torch.library.Library("aten", "IMPL")
    _registered.append(library)

    # torch calls these itself, below the modes: `torch.tensor` and indices that are lists.
    def empty_strided(size: Any, stride: Any, **kwargs: Any) -> Tensor:
        return DeviceTensor(torch.empty_strided(size, stride, dtype=kwargs.get("dtype")))

    def empty(size: Any, **kwargs: Any) -> Tensor:
        return DeviceTensor(torch.empty(size, dtype=kwargs.get("dtype")))

    def copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        return _device()._copy(target, source, non_blocking)

    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("copy_", copy, "PrivateUse1")


@contextlib.contextmanager
def async_device() -> Iterator[AsyncDevice]:
    """Yield the device, for this thread. Other threads call `AsyncDevice.used_here`."""
    _register()
    device = AsyncDevice()
    _active.append(device)
    try:
        with device.used_here():
            yield device
    finally:
        _active.pop()
