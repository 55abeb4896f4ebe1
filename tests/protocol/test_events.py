"""What a traced request is told of its way."""

import queue
from dataclasses import replace
from typing import Any

import pytest

from serve_app.config import EngineConfig
from serve_app.engine.batching.rendezvous import Rendezvous
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.request import Request, link_batch_peers
from serve_app.errors import Cancelled, GenerationFailed
from serve_app.protocol.events import (
    MAX_PEERS,
    Completed,
    Event,
    Failed,
    GenerationResult,
    Progress,
    Queued,
    Timeline,
)
from serve_app.protocol.params import INITIAL, GenerationParams, RequestContext
from tests.conftest import DEMO, FIFO


class Asked:
    """A request, and what is heard of it."""

    def __init__(self, engine: Engine, trace: str = "mine", **options: Any) -> None:
        given = {"width": 64, "height": 64, "num_inference_steps": 6} | options
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        params = GenerationParams("a red circle", 1, **given)
        self.number = engine.submit(params, self._events.put, RequestContext(trace=trace))

    def until(self, kind: type[Event]) -> list[Event]:
        """What comes up to the first of this kind."""
        heard: list[Event] = []
        while not heard or not isinstance(heard[-1], kind):
            heard.append(self._events.get(timeout=60))
        return heard

    def to_the_end(self) -> tuple[list[Timeline], Completed | Failed]:
        heard: list[Event] = []
        while not heard or not isinstance(heard[-1], Completed | Failed):
            heard.append(self._events.get(timeout=60))
        timelines = [event for event in heard if isinstance(event, Timeline)]
        last = heard[-1]
        assert isinstance(last, Completed | Failed)
        return timelines, last


def result_of(last: Event) -> GenerationResult:
    assert isinstance(last, Completed), last
    return last.result


def test_each_part_is_told_when_it_has_ended(demo_engine: Engine) -> None:
    timelines, last = Asked(demo_engine).to_the_end()
    result = result_of(last)
    assert [len(timeline.parts_s) for timeline in timelines] == [1, 2, 3, 3]
    end = timelines[-1]
    assert end.parts_s == (result.queue_s, result.encode_s, result.denoise_s)
    assert [step.batch_size for step in end.steps] == [1] * 6
    ended_s = [step.ended_s for step in end.steps]
    assert ended_s == sorted(ended_s)
    assert ended_s[0] > 0
    assert ended_s[-1] == result.denoise_s
    assert end.peers == ()


def test_who_is_not_traced_is_told_nothing_of_it(demo_engine: Engine) -> None:
    timelines, last = Asked(demo_engine, trace="").to_the_end()
    assert isinstance(last, Completed)
    assert timelines == []


def test_batch_mates_know_each_other(demo_pipeline: LoadedPipeline) -> None:
    with Engine(demo_pipeline, DEMO, FIFO) as engine:
        first = Asked(engine, "first", num_inference_steps=60)
        first.until(Progress)
        others = [Asked(engine, name) for name in ("second", "third", "")]
        elsewhere = Asked(engine, "elsewhere", width=32, height=32)  # in no batch of theirs
        ends = {name: one.to_the_end()[0] for name, one in zip("23-", others, strict=True)}
        alone = elsewhere.to_the_end()[0][-1]
        whole = first.to_the_end()[0][-1]
    assert sorted(whole.peers) == ["second", "third"]
    assert {"first"} < {*ends["2"][-1].peers} <= {"first", "third"}
    assert ends["-"] == []
    assert alone.peers == ()
    sizes = [step.batch_size for step in whole.steps]
    assert len(sizes) == 60
    assert sizes[0] == 1
    assert max(sizes) == 4  # who is not traced counts as well
    assert sum(sizes) == 60 + 3 * 6


def test_who_is_dropped_is_told_how_far_it_came(demo_pipeline: LoadedPipeline) -> None:
    with Engine(demo_pipeline, DEMO, EngineConfig(max_running=1)) as engine:
        running = Asked(engine, num_inference_steps=100)
        running.until(Progress)
        waiting = Asked(engine)
        waiting.until(Queued)
        engine.cancel(waiting.number)
        engine.cancel(running.number)
        waited, of_the_waiting = waiting.to_the_end()
        generated, of_the_running = running.to_the_end()
    for last in (of_the_waiting, of_the_running):
        assert isinstance(last, Failed)
        assert isinstance(last.error, Cancelled)
    assert waited == [Timeline()]
    assert len(generated[-1].parts_s) == 2
    assert generated[-1].steps


def test_who_fails_is_told_where(
    demo_pipeline: LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(demo_pipeline, DEMO, FIFO) as engine:
        forward, calls = Rendezvous.forward, 0

        def broken(rendezvous: Rendezvous, call: Any) -> Any:
            nonlocal calls
            calls += call.site in demo_pipeline.denoisers
            if calls == 3:
                raise RuntimeError("broken")
            return forward(rendezvous, call)

        monkeypatch.setattr(Rendezvous, "forward", broken)
        timelines, last = Asked(engine).to_the_end()
    assert isinstance(last, Failed)
    assert isinstance(last.error, GenerationFailed)
    assert len(timelines[-1].parts_s) == 2
    assert len(timelines[-1].steps) == 2


def test_no_more_mates_are_kept_than_are_told() -> None:
    params = GenerationParams("x", 1, num_inference_steps=4)

    def one(trace: str) -> Request:
        context = replace(INITIAL, trace=trace)
        return Request(1, params, context, lambda _: None, 1.0)

    mine = one("mine")
    for start in range(0, 1_000, 15):
        link_batch_peers([mine, *(one(f"{number}") for number in range(start, start + 15))])
    assert len(mine.peers) < MAX_PEERS + 16
    assert mine.timeline.peers == tuple(str(number) for number in range(MAX_PEERS))
