"""Durations of calls on a device, measured without making the device idle."""

import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

A = TypeVar("A")
T = TypeVar("T")


class DeviceEvent(Protocol):
    """The part of `torch.cuda.Event` that `CallTimer` uses."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end_event: Any, /) -> float:
        """Return the milliseconds from this event to ``end_event``."""
        ...


def _cuda_event() -> DeviceEvent:
    event: DeviceEvent = torch.cuda.Event(enable_timing=True)
    return event


def wait_for_device() -> None:
    """Wait until the GPU, if one is in use, has finished all calls.

    Without this, the clock measures the time to launch a call and not the time to run it.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class CallTimer:
    """Runner of consecutive calls that measures the duration of each.

    A GPU runs asynchronously. Waiting for each call would leave it idle while the program prepares
    the next one. Never waiting would fill its queue with steps of requests that may be cancelled.
    So the timer launches a call and then waits for the call before it, whose duration is known only
    then. The GPU never has more than one call queued behind the running one.
    """

    def __init__(
        self, device: torch.device, new_event: Callable[[], DeviceEvent] = _cuda_event
    ) -> None:
        self._new_event = new_event if device.type == "cuda" else None
        self._pending: tuple[DeviceEvent, DeviceEvent, Callable[[float], None]] | None = None
        self._afterwards: list[Callable[[], None]] = []

    def run(self, call: Callable[[A], T], argument: A, took: Callable[[float], None]) -> T:
        """Return ``call(argument)``; pass its seconds to ``took``, now or after the next call.

        If ``call`` raises, the error propagates and ``took`` is never called. The argument is a
        separate parameter so that a traceback holds only plain variables, which can be cleared.
        """
        if self._new_event is None:
            started_at = time.perf_counter()
            output = call(argument)
            took(time.perf_counter() - started_at)
            return output
        start, end = self._new_event(), self._new_event()
        start.record()
        output = call(argument)
        end.record()
        self.wait()
        self._pending = start, end, took
        return output

    def wait(self) -> None:
        """Wait until the last call is done."""
        if self._pending is None:
            return
        start, end, took = self._pending
        self._pending = None
        end.synchronize()
        took(start.elapsed_time(end) / 1000)
        while self._afterwards:
            self._afterwards.pop(0)()

    def afterwards(self, do: Callable[[], None]) -> None:
        """Call ``do`` once the duration of the last call is known, which may be now."""
        if self._pending is None:
            do()
        else:
            self._afterwards.append(do)
