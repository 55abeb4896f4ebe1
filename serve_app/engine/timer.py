"""Durations of calls on a device, measured without making the device idle."""

import statistics
import time
from collections import deque
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


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the median time of some runs on the device, each with the time to launch it."""
    taken = []
    wait_for_device()
    for _ in range(repeats):
        started_at = time.perf_counter()
        run()
        wait_for_device()
        taken.append(time.perf_counter() - started_at)
    return statistics.median(taken)


Took = Callable[[float, float], None]
"""Receives the seconds that something took on the device, and the time at its end.

The time is that of the host, by `time.perf_counter`.
"""


class _HostEvent:
    """An event of a CPU, which has done everything when a call returns."""

    _at_s: float

    def record(self) -> None:
        self._at_s = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end_event: "_HostEvent", /) -> float:
        return 1000 * (end_event._at_s - self._at_s)


class CallTimer:
    """Runner of consecutive calls that measures the duration of each, on the device's own clock.

    A GPU runs asynchronously. Waiting for each call would leave it idle while the program prepares
    the next one. Never waiting would fill its queue with steps of requests that may be cancelled.
    So the timer launches a call and then waits for the call before it, whose duration is known only
    then. The GPU never has more than one call queued behind the running one.

    The host's clock would be wrong for what happens between two calls: it runs while the device is
    still busy, and a program that waits for the device would count the call before it twice. CPU
    time is no better, because CUDA waits in a busy loop. Seconds on the device's clock are what a
    request really takes from the others: its own small kernels, and the time without work.
    """

    def __init__(
        self,
        device: torch.device,
        new_event: Callable[[], DeviceEvent] = _cuda_event,
        paused: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """Measure on ``device``; ``paused`` gets the seconds before each call without a call."""
        self._ahead = device.type != "cpu"
        self._new_event = new_event if self._ahead else _HostEvent
        self._paused = paused
        self._pending: deque[tuple[DeviceEvent, DeviceEvent, Took]] = deque()
        self._mark: DeviceEvent | None = None  # end of the last call or lap
        self._idle_since: DeviceEvent | None = None  # end of the last call
        self._last_call: DeviceEvent | None = None  # the same, unless somebody waited for it

    def resume(self) -> None:
        """Forget the time since the last call: there was nothing to do."""
        self._mark = self._idle_since = self._recorded()

    def run(self, call: Callable[[A], T], argument: A, took: Took) -> T:
        """Return ``call(argument)``; pass its duration to ``took``, now or after the next call.

        If ``call`` raises, the error propagates and ``took`` is never called. The argument is a
        separate parameter so that a traceback holds only plain variables, which can be cleared.
        """
        start = self._recorded()
        if self._idle_since is not None:
            self._pending.append((self._idle_since, start, self._end_pause))
        output = call(argument)
        self._mark = self._idle_since = self._recorded()
        self._pending.append((start, self._mark, took))
        before, self._last_call = self._last_call, self._mark
        self._wait_for(before if self._ahead else self._mark)
        return output

    def lap(self, took: Took) -> None:
        """Pass the time since the last call or lap to ``took``, once it is known."""
        end = self._recorded()
        self._pending.append((self._mark or end, end, took))
        self._mark = end
        if not self._ahead:
            self._wait_for(end)

    def wait(self) -> None:
        """Wait until everything is done."""
        self._last_call = None
        if self._pending:
            self._wait_for(self._pending[-1][1])

    def when_done(self, do: Callable[[float], None]) -> None:
        """Pass the time at which the last call or lap is done to ``do``, once it is known."""
        if self._mark is None or not self._pending:
            do(time.perf_counter())
        else:
            self._pending.append((self._mark, self._mark, lambda _, ended_at: do(ended_at)))

    def _recorded(self) -> DeviceEvent:
        event = self._new_event()
        event.record()
        return event

    def _wait_for(self, done: DeviceEvent | None) -> None:
        """Wait for an event, and report everything that ended before it."""
        if done is None:
            return
        done.synchronize()
        now, reached = time.perf_counter(), False
        while self._pending:
            start, end, took = self._pending[0]
            if reached and end is not done:
                break
            reached = end is done
            self._pending.popleft()
            took(start.elapsed_time(end) / 1000, now - end.elapsed_time(done) / 1000)

    def _end_pause(self, seconds: float, _: float) -> None:
        self._paused(seconds)
