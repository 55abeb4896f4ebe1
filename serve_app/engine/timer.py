"""How long calls take on a device, without making it idle to find out."""

import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

A = TypeVar("A")
T = TypeVar("T")


class Event(Protocol):
    """What `CallTimer` needs of a `torch.cuda.Event`."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end_event: Any, /) -> float:
        """In milliseconds."""
        ...


def _cuda_event() -> Event:
    event: Event = torch.cuda.Event(enable_timing=True)
    return event


def wait_for_device() -> None:
    """Until it is done: or the time of a call would be that of asking for it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class CallTimer:
    """Runs calls one after another and tells how long each took.

    A GPU works behind the program's back. Waiting for each call would leave it idle while the
    program prepares the next; never waiting would fill its queue with steps of requests that may be
    cancelled. So each call is asked for, and then the one before it waited for, whose time is known
    only then: the GPU never has more than one call to do after that which it is at.
    """

    def __init__(self, device: torch.device, new_event: Callable[[], Event] = _cuda_event) -> None:
        self._new_event = new_event if device.type == "cuda" else None
        self._pending: tuple[Event, Event, Callable[[float], None]] | None = None
        self._afterwards: list[Callable[[], None]] = []

    def run(self, call: Callable[[A], T], argument: A, took: Callable[[float], None]) -> T:
        """What ``call`` returns; ``took`` is given its seconds, now or after the next call.

        Raises what ``call`` raises, and then ``took`` is never called. The argument is apart, so
        that a traceback has none but plain variables to let go of.
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
        """Until the last call is done."""
        if self._pending is None:
            return
        start, end, took = self._pending
        self._pending = None
        end.synchronize()
        took(start.elapsed_time(end) / 1000)
        while self._afterwards:
            self._afterwards.pop(0)()

    def afterwards(self, do: Callable[[], None]) -> None:
        """Call ``do`` once the time of the last call is known, which may be now."""
        if self._pending is None:
            do()
        else:
            self._afterwards.append(do)
