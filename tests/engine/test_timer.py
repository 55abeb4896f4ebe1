"""The timer launches one call ahead of the device, and no more, and measures on its clock."""

import time

import pytest
import torch

from serve_app.engine.timer import CallTimer, DeviceEvent
from tests.fakes.async_device import AsyncDevice, Event

CUDA = torch.device("cuda")


class LoggedEvent(Event):
    """An event of the fake device that logs each use by the time at which the device reaches it."""

    def record(self) -> None:
        super().record()
        self.device.log.append(f"record {self.at:g}")

    def synchronize(self) -> None:
        super().synchronize()
        self.device.log.append(f"wait for {self.at:g}")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> AsyncDevice:
    """A device whose clock is that of the host as well."""
    made = AsyncDevice()
    monkeypatch.setattr(time, "perf_counter", made.now)
    return made


@pytest.fixture
def timer(device: AsyncDevice) -> CallTimer:
    def new_event() -> DeviceEvent:
        return LoggedEvent(device)

    return CallTimer(CUDA, new_event, lambda seconds: device.log.append(f"paused {seconds:g}"))


def test_a_call_is_launched_before_the_previous_one_is_done(
    device: AsyncDevice, timer: CallTimer
) -> None:
    for seconds in (2.0, 3.0):
        timer.run(
            device.launch,
            seconds,
            lambda took_s, ended_at: device.log.append(f"took {took_s:g} until {ended_at:g}"),
        )
    timer.wait()
    timer.wait()  # no call is left
    assert device.log == [
        "record 0",
        "record 2",
        "record 2",
        "record 5",
        "wait for 2",
        "took 2 until 2",
        "wait for 5",
        "paused 0",
        "took 3 until 5",
    ]


def test_a_lap_takes_the_time_that_the_device_spends_on_it(
    device: AsyncDevice, timer: CallTimer
) -> None:
    """The host may run ahead of the device, or wait for it: neither counts."""
    laps: list[tuple[float, float]] = []
    for waits in (False, True):
        timer.run(device.launch, 2.0, lambda *_: None)
        device.launch(0.25)
        if waits:
            device.wait()
        timer.lap(lambda *lap: laps.append(lap))
    timer.wait()
    assert laps == [(0.25, 2.25), (0.25, 4.5)]


def test_a_lap_contains_the_time_without_work(device: AsyncDevice, timer: CallTimer) -> None:
    laps: list[float] = []
    timer.run(device.launch, 2.0, lambda *_: None)
    device.wait()  # a hidden wait, and then work of the host
    device.work(0.5)
    timer.lap(lambda seconds, _: laps.append(seconds))
    timer.run(device.launch, 2.0, lambda *_: None)
    timer.wait()
    assert laps == [0.5]
    assert "paused 0.5" in device.log


def test_waiting_for_work_is_no_pause(device: AsyncDevice, timer: CallTimer) -> None:
    timer.run(device.launch, 2.0, lambda *_: None)
    timer.wait()
    device.work(100.0)
    timer.resume()
    laps: list[float] = []
    timer.lap(lambda seconds, _: laps.append(seconds))
    timer.run(device.launch, 2.0, lambda *_: None)
    timer.wait()
    assert laps == [0.0]
    assert "paused 0" in device.log
    assert not any("paused 100" in line for line in device.log)


def test_a_callback_gets_the_time_at_which_the_device_is_done(
    device: AsyncDevice, timer: CallTimer
) -> None:
    done: list[float] = []
    timer.when_done(done.append)
    assert done == [0.0]  # at once: nothing runs
    timer.run(device.launch, 2.0, lambda *_: None)
    device.launch(0.5)
    timer.lap(lambda *_: None)
    timer.when_done(done.append)
    timer.run(device.launch, 4.0, lambda *_: None)
    timer.run(device.launch, 4.0, lambda *_: None)
    assert done == [0.0, 2.5]
    assert device.now() == 6.5


def test_a_call_that_raises_reports_no_duration(device: AsyncDevice, timer: CallTimer) -> None:
    times: list[float] = []

    def fail(_: None) -> None:
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        timer.run(fail, None, lambda seconds, _: times.append(seconds))
    timer.wait()
    assert times == []
    assert timer.run(len, "abc", lambda seconds, _: times.append(seconds)) == 3
    timer.wait()
    assert times == [0.0]


def test_a_cpu_is_measured_when_it_returns() -> None:
    """Its compute between two calls is work of the device, so the clock on the wall is right."""
    timer = CallTimer(torch.device("cpu"))
    times: list[tuple[float, float]] = []
    started_at = time.perf_counter()
    timer.resume()
    assert timer.run(sum, range(10_000), lambda *time_: times.append(time_)) == 49995000
    sum(range(10_000))
    timer.lap(lambda *time_: times.append(time_))
    ended_at = time.perf_counter()
    timer.when_done(lambda at: times.append((0.0, at)))
    (call_s, called_at), (lap_s, lapped_at), (_, done_at) = times
    assert call_s > 0
    assert lap_s > 0
    assert call_s + lap_s <= ended_at - started_at
    assert started_at < called_at < lapped_at <= ended_at <= done_at
