"""The iterator over the events of one request."""

import queue

import pytest

from serve_app.engine.stream import EventStream
from serve_app.errors import Cancelled
from serve_app.protocol.events import Event, Failed, Progress


@pytest.fixture
def events() -> "queue.SimpleQueue[Event]":
    return queue.SimpleQueue()


def test_the_stream_ends_with_the_last_event(events: "queue.SimpleQueue[Event]") -> None:
    cancelled: list[bool] = []
    stream = EventStream(events, lambda: cancelled.append(True))
    last = Failed(Cancelled("the request was cancelled."))
    for event in (Progress(1, 2), last):
        events.put(event)
    assert list(stream) == [Progress(1, 2), last]
    stream.close()
    assert not cancelled


def test_closing_a_stream_cancels_once_even_before_its_first_event(
    events: "queue.SimpleQueue[Event]",
) -> None:
    cancelled: list[bool] = []
    stream = EventStream(events, lambda: cancelled.append(True))
    stream.close()
    stream.close()
    assert list(stream) == []
    del stream
    assert cancelled == [True]


def test_a_stream_that_is_dropped_cancels(events: "queue.SimpleQueue[Event]") -> None:
    cancelled: list[bool] = []
    EventStream(events, lambda: cancelled.append(True))
    assert cancelled == [True]
