"""The scheduler starts requests so that batches are full."""

from typing import cast

import pytest

from serve_app.engine.loras.cache import LoraCache
from serve_app.engine.loras.source import AdapterFile
from serve_app.engine.metrics import EngineMetrics
from serve_app.engine.model.adapters import Adapters, LoadedAdapter
from serve_app.engine.request import Request
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.scheduling.cost import CostModel
from serve_app.engine.scheduling.on_time import OnTime
from serve_app.engine.scheduling.policies import Fifo, ShortestFirst
from serve_app.engine.scheduling.queue import RankedPolicy
from serve_app.protocol.params import INITIAL, GenerationParams


def request(number: int, deadline_at: float) -> Request:
    one = Request(number, GenerationParams(prompt="a circle", seed=0), INITIAL, lambda _: None, 0.0)
    one.entry.remaining_s, one.entry.deadline_at = 10.0, deadline_at
    return one


def scheduler(
    max_running: int, max_batch_size: int, policy: RankedPolicy | None = None
) -> Scheduler:
    new = Scheduler(policy or OnTime(), CostModel(max_batch_size))
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


class Networks:
    """Networks that take any adapter."""

    def attach(self, name: str, adapter: object) -> None:
        pass

    def detach(self, name: str) -> None:
        pass


@pytest.mark.parametrize("policy", [OnTime, Fifo, ShortestFirst])
def test_a_request_that_needs_room_does_not_wait_for_ever(policy: type[RankedPolicy]) -> None:
    """A request that comes before it in the order of the policy must not wait for it either."""
    waiting = scheduler(max_running=4, max_batch_size=4, policy=policy())
    loading: list[str] = []
    cache = waiting.loras = LoraCache(
        cast(Adapters, Networks()), lambda file: loading.append(file.name), 1, 2**30,
        EngineMetrics("scheduler"),
    )  # fmt: skip

    def arrive(number: int, adapter: str, deadline_at: float) -> None:
        one = request(number, deadline_at)
        one.entry.remaining_s = deadline_at
        one.lora_files = (AdapterFile(adapter, 1),)
        waiting.add(one)
        waiting.enqueue(one)

    def start_all() -> list[int]:
        started = []
        while not started or loading:
            while one := waiting.start_next(0.0):
                started.append(one.number)
            if not loading:
                break
            name = loading.pop()
            cache.ended(name, LoadedAdapter(name, (), 1))
        return started

    arrive(1, "a", 10.0)
    assert start_all() == [1]
    arrive(2, "b", 30.0)
    assert start_all() == []  # the only place is held
    arrive(3, "c", 20.0)
    ended = []
    while waiting.running:
        ended.append(waiting.running[0].number)
        waiting.remove(waiting.running[0])
        start_all()
    assert sorted(ended) == [1, 2, 3]
    assert waiting.is_idle
