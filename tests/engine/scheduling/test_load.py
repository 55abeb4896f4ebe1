"""The figures by which replicas are scaled, on a clock that the tests turn."""

import threading
from dataclasses import asdict
from random import Random

import pytest

from serve_app.engine.scheduling.load import WINDOW_S, LoadTracker


def test_an_engine_of_which_nothing_is_known() -> None:
    load = LoadTracker().load(5.0)
    assert (load.backlog_s, load.batch_backlog_s, load.arrival_rate) == (0, 0, 0)
    assert (load.throughput, load.mean_work_s, load.utilization) == (1, 0, 0)
    # What the autoscaling policy reads, by these names.
    assert asdict(load).keys() == {
        "backlog_s",
        "batch_backlog_s",
        "arrival_rate",
        "throughput",
        "mean_work_s",
        "utilization",
    }


def run(tracker: LoadTracker, gain: float, seconds: float, low_priority: bool = False) -> float:
    """One request after the other of ten steps, each step done ``gain`` times as fast."""
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
def test_throughput_is_work_done_in_busy_time(gain: float) -> None:
    tracker = LoadTracker()
    now = run(tracker, gain, 100)
    assert tracker.throughput() == pytest.approx(gain, rel=0.05)
    tracker.accepted(now + 1e4, 2.0, False)  # an idle night changes nothing
    assert tracker.throughput() == pytest.approx(gain, rel=0.05)
    assert tracker.backlog_s() == pytest.approx(2.0 / gain, rel=0.05)


def test_the_backlog_is_what_is_left_by_class() -> None:
    tracker = LoadTracker()
    tracker.accepted(0.0, 4.0, False)
    tracker.accepted(0.0, 10.0, True)
    tracker.update_remaining(0.0, 4.0, 3.0, False)
    tracker.ended(0.0, 3.0, False)  # cancelled
    assert tracker.backlog_s() == 0
    assert tracker.backlog_s(low_priority=True) * tracker.throughput() == pytest.approx(10.0)
    tracker.ended(0.0, 10.0, True)
    assert tracker.backlog_s(low_priority=True) == 0


def test_work_may_turn_out_longer() -> None:
    """The first request of a size comes before anything is known of it."""
    tracker = LoadTracker()
    tracker.accepted(0.0, 0.0, False)
    tracker.update_remaining(1.0, 0.0, 9.0, False)
    tracker.update_remaining(2.0, 9.0, 8.0, False)
    assert tracker.throughput() == 1.0
    assert tracker.backlog_s() == 8.0


def test_work_offered_and_time_busy_are_those_of_the_last_half_minute() -> None:
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


def test_batch_work_keeps_no_replica() -> None:
    tracker = LoadTracker()
    now = run(tracker, 1.0, WINDOW_S, low_priority=True)
    assert tracker.load(now).utilization == 0
    assert tracker.throughput() == pytest.approx(1.0)


def test_any_thread_may_look() -> None:
    tracker = LoadTracker()
    seen = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            seen.append(tracker.load(now))

    now, rng = 0.0, Random(1)
    thread = threading.Thread(target=look)
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
