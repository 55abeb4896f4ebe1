"""Requests for an engine, and ways to run and compare them."""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from serve_app.engine.engine import Engine
from serve_app.engine.startup import comparison
from serve_app.errors import (
    Overloaded,
    Unavailable,
)
from serve_app.protocol.events import Completed, Event, Failed, GenerationResult, Progress
from serve_app.protocol.params import INITIAL, GenerationParams, RequestContext

TOLERANCE = 2e-5
"""Largest difference of a pixel in [0, 1] between batched and alone, in float32 on a CPU.

Processors round differently: 1.0e-5 was seen on one without AVX-512.
"""


def params(prompt: str = "a red circle on blue", seed: int = 1, **options: Any) -> GenerationParams:
    return GenerationParams(
        **(
            {"prompt": prompt, "seed": seed, "width": 64, "height": 64, "num_inference_steps": 6}
            | options
        )
    )


def result_of(events: list[Event]) -> GenerationResult:
    last = events[-1]
    assert isinstance(last, Completed), last
    return last.result


def largest_difference(results: list[GenerationResult], alone: list[torch.Tensor]) -> float:
    """Over all pixels, in [0, 1]; ``alone`` holds results of `LoadedPipeline.generate`."""
    images = [image[0] for image in alone]
    return comparison.largest_difference([result.pixels for result in results], images)


def together(
    engine: Engine, requests: Sequence[GenerationParams]
) -> tuple[list[torch.Tensor], float]:
    """Return the images of requests of which none goes on before all are there, and the mean batch.

    So the batches do not depend on a clock."""
    submitted = threading.Event()
    ends: list[queue.SimpleQueue[Event]] = [queue.SimpleQueue() for _ in requests]

    def report(index: int) -> Callable[[Event], None]:
        def on_event(event: Event) -> None:
            if isinstance(event, Progress):
                assert submitted.wait(30)  # on the engine's thread
            elif isinstance(event, Completed | Failed):
                ends[index].put(event)

        return on_event

    before = engine.stats()
    for index, request in enumerate(requests):
        engine.submit(request, report(index))
    submitted.set()
    images = [result_of([end.get(timeout=240)]).pixels for end in ends]
    after = engine.stats()
    calls = after.denoiser_calls - before.denoiser_calls
    return images, (after.steps - before.steps) / calls


def has_stopped(engine: Engine) -> bool:
    try:
        engine.check()
    except Unavailable:
        return True
    return False


def hold(engine: Engine, request: GenerationParams) -> tuple[int, list[Event], threading.Event]:
    """Submit; return the number, the events so far, and an event that is set after three steps."""
    events: list[Event] = []
    moving = threading.Event()

    def on_event(event: Event) -> None:
        events.append(event)
        if isinstance(event, Progress) and event.step == 3:
            moving.set()

    return engine.submit(request, on_event), events, moving


def measured(engine: Engine) -> float:
    """Teach it the cost of ten steps; return the seconds that it predicts for 100."""
    for _ in range(3):
        engine.generate(params(num_inference_steps=10))
    return engine.cost.predict_steps((64, 64), 100)


def submitted(
    engine: Engine, request: GenerationParams, context: RequestContext = INITIAL
) -> tuple[int, Event, queue.SimpleQueue[Event]]:
    """Submit; return the number, the first event, and a queue of the others."""
    inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
    number = engine.submit(request, inbox.put, context)
    return number, inbox.get(timeout=120), inbox


def rejected(event: Event) -> Overloaded:
    assert isinstance(event, Failed), event
    assert isinstance(event.error, Overloaded), event.error
    return event.error
