"""How long calls take on a device, without making it idle to find out."""

import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

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


class CallTimer:
    """Runs calls one after another and tells how long each took.

    A GPU works behind the program's back. Waiting for each call would leave it idle while the
    program prepares the next; never waiting would fill its queue with steps of requests that may be
    cancelled. So each call waits for the one before it, and that one's time is known only then.
    """

    def __init__(self, device: torch.device, new_event: Callable[[], Event] = _cuda_event) -> None:
        self._new_event = new_event if device.type == "cuda" else None
        self._pending: tuple[Event, Event, Callable[[float], None]] | None = None
        self._afterwards: list[Callable[[], None]] = []

    def run(self, call: Callable[[], T], took: Callable[[float], None]) -> T:
        """What ``call`` returns; ``took`` is given its seconds, now or before the next call.

        Raises what ``call`` raises, and then ``took`` is never called.
        """
        if self._new_event is None:
            started_at = time.perf_counter()
            output = call()
            took(time.perf_counter() - started_at)
            return output
        self.wait()
        start, end = self._new_event(), self._new_event()
        start.record()
        output = call()
        end.record()
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
