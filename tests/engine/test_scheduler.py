"""The scheduler starts requests so that batches are full."""

import pytest

from serve_app.engine.request import Request
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.scheduling.cost import CostModel
from serve_app.engine.scheduling.on_time import OnTime
from serve_app.protocol.params import INITIAL, GenerationParams


def request(number: int, deadline_at: float) -> Request:
    one = Request(number, GenerationParams(prompt="a circle", seed=0), INITIAL, lambda _: None, 0.0)
    one.entry.remaining_s, one.entry.deadline_at = 10.0, deadline_at
    return one


def scheduler(max_running: int, max_batch_size: int) -> Scheduler:
    new = Scheduler(OnTime(), CostModel(max_batch_size))
    new.max_running = max_running
    return new


def start(scheduler: Scheduler, numbers: range, deadline_at: float) -> int:
    """Add requests and return how many requests run then."""
    for number in numbers:
        one = request(number, deadline_at)
        scheduler.add(one)
        scheduler.enqueue(one)
    while scheduler.start_next(0.0):
        pass
    return len(scheduler.running)


@pytest.mark.parametrize("slots", [1, 8, 32])
def test_late_requests_may_use_every_slot(slots: int) -> None:
    assert start(scheduler(slots, 16), range(40), deadline_at=1.0) == slots


def test_a_stream_of_new_requests_keeps_no_late_one_from_its_slot() -> None:
    full = scheduler(max_running=2, max_batch_size=2)
    start(full, range(4), deadline_at=1.0)
    for number in range(4, 10):  # a slot becomes free, and another request arrives
        full.remove(full.running[0])
        start(full, range(number, number + 1), deadline_at=100.0 + number)
    assert [one.number for one in full.running] == [6, 7]
