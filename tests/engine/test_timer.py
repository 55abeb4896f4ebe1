"""The timer launches one call ahead of the device, and no more."""

import time

import pytest
import torch

from serve_app.engine.timer import CallTimer


class FakeEvent:
    """Event of a device on which every call takes 2 s; logs each use."""

    log: list[str]
    count: int

    def __init__(self) -> None:
        type(self).count += 1
        self.name = f"event {self.count}"

    def record(self) -> None:
        self.log.append(f"record {self.name}")

    def synchronize(self) -> None:
        self.log.append(f"wait for {self.name}")

    def elapsed_time(self, _: "FakeEvent") -> float:
        return 2000.0


@pytest.fixture
def log() -> list[str]:
    FakeEvent.log, FakeEvent.count = [], 0
    return FakeEvent.log


def test_a_call_is_launched_before_the_previous_one_is_done(log: list[str]) -> None:
    timer = CallTimer(torch.device("cuda"), FakeEvent)
    for number in (1, 2):
        output = timer.run(
            lambda number: log.append(f"call {number}"),
            number,
            lambda seconds, number=number: log.append(f"call {number} took {seconds:g} s"),
        )
        assert output is None
    timer.wait()
    timer.wait()  # no call is left
    assert log == [
        "record event 1",
        "call 1",
        "record event 2",
        "record event 3",
        "call 2",
        "record event 4",
        "wait for event 2",
        "call 1 took 2 s",
        "wait for event 4",
        "call 2 took 2 s",
    ]


def test_a_callback_runs_once_the_last_duration_is_known(log: list[str]) -> None:
    timer = CallTimer(torch.device("cuda"), FakeEvent)
    timer.afterwards(lambda: log.append("at once"))
    timer.run(len, "", lambda _: log.append("took"))
    timer.afterwards(lambda: log.append("afterwards"))
    assert log == ["at once", "record event 1", "record event 2"]
    timer.wait()
    assert log[3:] == ["wait for event 2", "took", "afterwards"]


def test_a_call_that_raises_reports_no_duration(log: list[str]) -> None:
    timer = CallTimer(torch.device("cuda"), FakeEvent)
    times: list[float] = []

    def fail(_: None) -> None:
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        timer.run(fail, None, times.append)
    timer.wait()
    assert times == []
    assert timer.run(len, "abc", times.append) == 3


def test_a_call_on_a_cpu_is_measured_when_it_returns() -> None:
    times: list[float] = []
    started_at = time.perf_counter()
    assert CallTimer(torch.device("cpu")).run(sum, range(10_000), times.append) == 49995000
    assert 0 < times[0] <= time.perf_counter() - started_at
