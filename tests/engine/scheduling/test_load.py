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


def run(demand: LoadTracker, gain: float, seconds: float, background: bool = False) -> float:
    """One request after the other of ten steps, each step done ``gain`` times as fast."""
    now = 100.0
    while now < 100.0 + seconds:
        demand.accepted(now, 2.0, background)
        for step in range(10):
            now += 0.2 / gain
            demand.called(0.2, 0.2 / gain)
            demand.update_remaining(now, 2.0 - 0.2 * step, 1.8 - 0.2 * step, background)
        demand.ended(now, 0.0, background)
    return now


@pytest.mark.parametrize("gain", [0.5, 1.0, 3.0])
def test_throughput_is_work_done_in_busy_time(gain: float) -> None:
    demand = LoadTracker()
    now = run(demand, gain, 100)
    assert demand.throughput() == pytest.approx(gain, rel=0.05)
    demand.accepted(now + 1e4, 2.0, False)  # an idle night changes nothing
    assert demand.throughput() == pytest.approx(gain, rel=0.05)
    assert demand.backlog_s() == pytest.approx(2.0 / gain, rel=0.05)


def test_the_backlog_is_what_is_left_by_class() -> None:
    demand = LoadTracker()
    demand.accepted(0.0, 4.0, False)
    demand.accepted(0.0, 10.0, True)
    demand.update_remaining(0.0, 4.0, 3.0, False)
    demand.ended(0.0, 3.0, False)  # cancelled
    assert demand.backlog_s() == 0
    assert demand.backlog_s(background=True) * demand.throughput() == pytest.approx(10.0)
    demand.ended(0.0, 10.0, True)
    assert demand.backlog_s(background=True) == 0


def test_work_may_turn_out_longer() -> None:
    """The first request of a size comes before anything is known of it."""
    demand = LoadTracker()
    demand.accepted(0.0, 0.0, False)
    demand.update_remaining(1.0, 0.0, 9.0, False)
    demand.update_remaining(2.0, 9.0, 8.0, False)
    assert demand.throughput() == 1.0
    assert demand.backlog_s() == 8.0


def test_work_offered_and_time_busy_are_those_of_the_last_half_minute() -> None:
    demand = LoadTracker()
    for second in range(100):
        demand.offered(float(second), 0.5)
    load = demand.load(100.0)
    assert load.arrival_rate == pytest.approx(0.5, rel=0.05)
    assert load.mean_work_s == 0.5
    assert demand.load(100.0 + 2 * WINDOW_S).arrival_rate == 0
    demand = LoadTracker()
    now = run(demand, 1.0, 2 * WINDOW_S)
    assert demand.load(now).utilization == pytest.approx(1.0, abs=0.05)
    assert demand.load(now + WINDOW_S / 2).utilization == pytest.approx(0.5, abs=0.06)


def test_batch_work_keeps_no_replica() -> None:
    demand = LoadTracker()
    now = run(demand, 1.0, WINDOW_S, background=True)
    assert demand.load(now).utilization == 0
    assert demand.throughput() == pytest.approx(1.0)


def test_any_thread_may_look() -> None:
    demand = LoadTracker()
    seen = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            seen.append(demand.load(now))

    now, rng = 0.0, Random(1)
    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(3000):
        demand.offered(now, 1.0)
        demand.accepted(now, 1.0, False)
        now += rng.random()
        demand.update_remaining(now, 1.0, 0.0, False)
        demand.ended(now, 0.0, False)
    stop.set()
    thread.join()
    assert seen
    assert all(load.backlog_s >= 0 and 0 <= load.utilization <= 1 for load in seen)
