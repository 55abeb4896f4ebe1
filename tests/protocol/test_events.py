"""Timelines of traced requests."""

import itertools
import queue
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from serve_app.config.models import EngineConfig
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
    to_host,
)
from serve_app.protocol.params import INITIAL, GenerationParams, RequestContext
from tests.conftest import DEMO, FIFO

pytestmark = pytest.mark.usefixtures("reused_starts")


class Submitted:
    """A request and its events."""

    def __init__(self, engine: Engine, trace: str = "mine", **options: Any) -> None:
        given = {"width": 64, "height": 64, "num_inference_steps": 6} | options
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        params = GenerationParams("a red circle", 1, **given)
        self.number = engine.submit(params, self._events.put, RequestContext(trace=trace))

    def until(self, kind: type[Event]) -> list[Event]:
        """Return the events up to the first of this kind."""
        received: list[Event] = []
        while not received or not isinstance(received[-1], kind):
            received.append(self._events.get(timeout=240))
        return received

    def to_the_end(self) -> tuple[list[Timeline], Completed | Failed]:
        received: list[Event] = []
        while not received or not isinstance(received[-1], Completed | Failed):
            received.append(self._events.get(timeout=240))
        timelines = [event for event in received if isinstance(event, Timeline)]
        last = received[-1]
        assert isinstance(last, Completed | Failed)
        return timelines, last


def result_of(last: Event) -> GenerationResult:
    assert isinstance(last, Completed), last
    return last.result


def test_a_timeline_follows_each_part_that_ends(demo_engine: Engine) -> None:
    timelines, last = Submitted(demo_engine).to_the_end()
    result = result_of(last)
    assert [len(timeline.parts_s) for timeline in timelines] == [1, 2, 3, 3]
    end = timelines[-1]
    assert end.parts_s == result.timings[:3]
    assert [step.batch_size for step in end.steps] == [1] * 6
    ended_s = [step.ended_s for step in end.steps]
    assert ended_s == sorted(ended_s)
    assert ended_s[0] > 0
    assert ended_s[-1] == result.timings.denoise_s
    assert end.peers == ()


def test_a_request_without_trace_gets_no_timeline(demo_engine: Engine) -> None:
    timelines, last = Submitted(demo_engine, trace="").to_the_end()
    assert isinstance(last, Completed)
    assert timelines == []


def test_requests_of_a_batch_are_peers(demo_pipeline: LoadedPipeline) -> None:
    with Engine(demo_pipeline, DEMO, FIFO) as engine:
        first = Submitted(engine, "first", num_inference_steps=60)
        first.until(Progress)
        others = [Submitted(engine, name) for name in ("second", "third", "")]
        elsewhere = Submitted(engine, "elsewhere", width=32, height=32)  # in none of their batches
        ends = {name: one.to_the_end()[0] for name, one in zip("23-", others, strict=True)}
        separate = elsewhere.to_the_end()[0][-1]
        complete = first.to_the_end()[0][-1]
    assert sorted(complete.peers) == ["second", "third"]
    assert {"first"} < {*ends["2"][-1].peers} <= {"first", "third"}
    assert ends["-"] == []
    assert separate.peers == ()
    sizes = [step.batch_size for step in complete.steps]
    assert len(sizes) == 60
    assert sizes[0] == 1
    assert max(sizes) == 4  # requests without trace count too
    assert sum(sizes) == 60 + 3 * 6


def test_a_cancelled_request_gets_its_timeline(demo_pipeline: LoadedPipeline) -> None:
    with Engine(demo_pipeline, DEMO, EngineConfig(max_running=1)) as engine:
        running = Submitted(engine, num_inference_steps=100)
        running.until(Progress)
        waiting = Submitted(engine)
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


def test_a_failed_request_gets_its_timeline(demo_pipeline: LoadedPipeline) -> None:
    [denoiser] = demo_pipeline.denoisers.values()
    layer = next(part for part in denoiser.modules() if isinstance(part, nn.Conv2d))
    calls = itertools.count(1)

    def fail_third(*_: object) -> None:
        if next(calls) == 3:
            raise RuntimeError("broken")

    with Engine(demo_pipeline, DEMO, FIFO) as engine:
        hook = layer.register_forward_pre_hook(fail_third)
        try:
            timelines, last = Submitted(engine).to_the_end()
        finally:
            hook.remove()
    assert isinstance(last, Failed)
    assert isinstance(last.error, GenerationFailed)
    assert len(timelines[-1].parts_s) == 2
    assert len(timelines[-1].steps) == 2


def test_the_number_of_peers_is_limited() -> None:
    params = GenerationParams("x", 1, num_inference_steps=4)

    def one(trace: str) -> Request:
        context = replace(INITIAL, trace=trace)
        return Request(1, params, context, lambda _: None, 1.0)

    mine = one("mine")
    for start in range(0, 1_000, 15):
        link_batch_peers([mine, *(one(f"{number}") for number in range(start, start + 15))])
    assert len(mine.peers) < MAX_PEERS + 16
    assert mine.timeline.peers == tuple(str(number) for number in range(MAX_PEERS))


def test_a_pixel_just_above_one_is_white() -> None:
    """Pixels are converted to bytes, which would wrap around."""
    image = to_host(torch.tensor([1.003, 1.0, -0.01]).reshape(3, 1, 1).float())
    assert image.getpixel((0, 0)) == (255, 255, 0)
