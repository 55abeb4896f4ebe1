"""The load by which replicas are scaled, on a clock that the tests set."""

import threading
from dataclasses import asdict
from random import Random

import pytest

from serve_app.engine.scheduling.load import WINDOW_S, LoadTracker


def test_a_new_engine_reports_no_load() -> None:
    load = LoadTracker().load(5.0)
    assert (load.backlog_s, load.batch_backlog_s, load.arrival_rate) == (0, 0, 0)
    assert (load.throughput, load.mean_work_s, load.utilization) == (1, 0, 0)
    # The autoscaling policy reads these names.
    assert asdict(load).keys() == {
        "backlog_s",
        "batch_backlog_s",
        "arrival_rate",
        "throughput",
        "mean_work_s",
        "utilization",
    }


def run(tracker: LoadTracker, gain: float, seconds: float, low_priority: bool = False) -> float:
    """Run requests of ten steps in turn, each step ``gain`` times as fast as predicted."""
    now = 100.0
    while now < 100.0 + seconds:
        tracker.accepted(now, 2.0, low_priority)
        for step in range(10):
            now += 0.2 / gain
            tracker.called(0.2, 0.2 / gain)
            tracker.update_remaining(now, 2.0 - 0.2 * step, 1.8 - 0.2 * step, low_priority)
        tracker.ended(now, 0.0, low_priority)
    return now


@pytest.mark.parametrize("gain", [0.5, 1.0, 3.0])
def test_throughput_is_work_per_busy_second(gain: float) -> None:
    tracker = LoadTracker()
    now = run(tracker, gain, 100)
    assert tracker.throughput() == pytest.approx(gain, rel=0.05)
    tracker.accepted(now + 1e4, 2.0, False)  # an idle night changes nothing
    assert tracker.throughput() == pytest.approx(gain, rel=0.05)
    assert tracker.backlog_s() == pytest.approx(2.0 / gain, rel=0.05)


def test_the_backlog_is_counted_by_priority() -> None:
    tracker = LoadTracker()
    tracker.accepted(0.0, 4.0, False)
    tracker.accepted(0.0, 10.0, True)
    tracker.update_remaining(0.0, 4.0, 3.0, False)
    tracker.ended(0.0, 3.0, False)  # cancelled
    assert tracker.backlog_s() == 0
    assert tracker.backlog_s(low_priority=True) * tracker.throughput() == pytest.approx(10.0)
    tracker.ended(0.0, 10.0, True)
    assert tracker.backlog_s(low_priority=True) == 0


def test_remaining_work_may_grow() -> None:
    """The first request of a size arrives before its costs are known."""
    tracker = LoadTracker()
    tracker.accepted(0.0, 0.0, False)
    tracker.update_remaining(1.0, 0.0, 9.0, False)
    tracker.update_remaining(2.0, 9.0, 8.0, False)
    assert tracker.throughput() == 1.0
    assert tracker.backlog_s() == 8.0


def test_arrival_rate_and_utilization_cover_the_window() -> None:
    tracker = LoadTracker()
    for second in range(100):
        tracker.offered(float(second), 0.5)
    load = tracker.load(100.0)
    assert load.arrival_rate == pytest.approx(0.5, rel=0.05)
    assert load.mean_work_s == 0.5
    assert tracker.load(100.0 + 2 * WINDOW_S).arrival_rate == 0
    tracker = LoadTracker()
    now = run(tracker, 1.0, 2 * WINDOW_S)
    assert tracker.load(now).utilization == pytest.approx(1.0, abs=0.05)
    assert tracker.load(now + WINDOW_S / 2).utilization == pytest.approx(0.5, abs=0.06)


def test_low_priority_work_does_not_count_as_utilization() -> None:
    tracker = LoadTracker()
    now = run(tracker, 1.0, WINDOW_S, low_priority=True)
    assert tracker.load(now).utilization == 0
    assert tracker.throughput() == pytest.approx(1.0)


def test_any_thread_may_read_the_load() -> None:
    tracker = LoadTracker()
    seen = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.append(tracker.load(now))

    now, rng = 0.0, Random(1)
    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(3000):
        tracker.offered(now, 1.0)
        tracker.accepted(now, 1.0, False)
        now += rng.random()
        tracker.update_remaining(now, 1.0, 0.0, False)
        tracker.ended(now, 0.0, False)
    stop.set()
    thread.join()
    assert seen
    assert all(load.backlog_s >= 0 and 0 <= load.utilization <= 1 for load in seen)
