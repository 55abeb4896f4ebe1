"""The engine on the shipped model: batched equals alone, and none is lost."""

import queue
import threading
from collections.abc import Callable

import pytest
import torch
from PIL import Image

from serve_app.config.limits import LimitsConfig
from serve_app.config.models import EngineConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.noise_schedulers import NOISE_SCHEDULERS
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.errors import (
    Cancelled,
    ConfigError,
    InvalidRequest,
    Unavailable,
)
from serve_app.protocol.events import Completed, Event, Failed, GenerationResult, Progress, Queued
from serve_app.protocol.params import GenerationParams
from tests.conftest import DEMO, FIFO
from tests.engine.engines import TOLERANCE, hold, largest_difference, params, result_of
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("reused_starts")


def sixteen() -> list[GenerationParams]:
    """Return requests that differ in prompt, seed, steps (5 to 30) and guidance."""
    colors = ["red", "green", "blue", "yellow", "orange", "purple", "cyan", "pink"]
    sides = [32] * 3 + [48] * 3 + [64] * 10
    return [
        GenerationParams(
            prompt=f"a {colors[index % 8]} {('circle', 'star')[index // 8]} on white",
            seed=1_000 + index,
            negative_prompt="a black background" if index % 3 == 0 else None,
            width=side,
            height=side,
            num_inference_steps=5 + round(index * 25 / 15),
            guidance_scale=1.0 if index % 5 == 4 else 2.0 + index / 4,
        )
        for index, side in enumerate(sides)
    ]


def test_sixteen_requests_together_equal_each_alone(
    demo_pipeline: LoadedPipeline, report: Callable[[str], None]
) -> None:
    requests = sixteen()
    alone = [demo_pipeline.generate(request) for request in requests]
    with Engine(demo_pipeline, DEMO, FIFO) as engine:
        streams = [engine.stream(request) for request in requests]
        results = [result_of(list(stream)) for stream in streams]
        stats = engine.stats()
    worst = largest_difference(results, alone)
    report(
        f"16 requests: mean batch size {stats.mean_batch_size:.2f}, {stats.steps} steps in "
        f"{stats.denoiser_calls} denoiser calls, largest difference from alone {worst:.1e}"
    )
    assert worst <= TOLERANCE
    assert stats.mean_batch_size > 4
    assert stats.steps == sum(request.num_inference_steps or 0 for request in requests)


def test_events_cover_the_whole_request(demo_engine: Engine) -> None:
    events = list(demo_engine.stream(params(num_inference_steps=4)))
    assert isinstance(events[0], Queued)
    assert events[1:-1] == [Progress(step, 4) for step in (1, 2, 3, 4)]
    result = result_of(events)
    assert result.pixels.shape == (3, 64, 64)
    assert result.image.size == (64, 64)
    assert result.params == params(num_inference_steps=4, acceleration="none")
    assert result.timings.queue_s >= 0
    assert result.timings.denoise_s > 0
    assert result.timings.decode_s > 0
    assert result.prompt_tokens > 4


def test_locate_reports_the_position_or_the_progress(demo_pipeline: LoadedPipeline) -> None:
    with Engine(demo_pipeline, DEMO, EngineConfig(max_running=1)) as engine:
        engine.generate(params(num_inference_steps=4))  # teaches the costs
        events: list[queue.SimpleQueue[Event]] = [queue.SimpleQueue() for _ in range(3)]
        numbers, places = [], []
        for number, inbox in enumerate(events):
            request = params(num_inference_steps=100, deadline_s=100.0 + number)
            numbers.append(engine.submit(request, inbox.put))
            places.append(inbox.get(timeout=120))
            if inbox is events[0]:
                assert isinstance(inbox.get(timeout=120), Progress)  # it runs
        assert [place.position for place in places if isinstance(place, Queued)] == [0, 0, 1]
        for number in numbers:
            engine.locate(number)
        told: Event = Progress(0, 100)
        while isinstance(told, Progress) and told.eta_s is None:
            told = events[0].get(timeout=120)
        assert isinstance(told, Progress)
        assert told.total_steps == 100
        second, third = events[1].get(timeout=120), events[2].get(timeout=30)
        assert isinstance(second, Queued)
        assert isinstance(third, Queued)
        assert (second.position, third.position) == (0, 1)
        assert told.eta_s is not None
        assert 0 < told.eta_s < second.eta_s < third.eta_s
        for number in numbers:
            engine.cancel(number)
        engine.locate(10_000)  # unknown


def test_a_truncated_prompt_gives_a_warning(demo_engine: Engine) -> None:
    assert demo_engine.generate(params(num_inference_steps=1)).warnings == ()
    long = "a red circle on blue " * 20
    result = demo_engine.generate(params(long, num_inference_steps=1, negative_prompt=long))
    assert result.warnings == (
        "prompt has 102 tokens; the model reads 32 of them.",
        "negative_prompt has 102 tokens; the model reads 32 of them.",
    )


def test_defaults_come_from_the_model(demo_engine: Engine) -> None:
    result = demo_engine.generate(GenerationParams("a green ring on white", 7))
    assert (result.params.width, result.params.height) == (64, 64)
    assert result.params.num_inference_steps == 20


def test_a_request_joins_and_leaves_at_any_step(demo_pipeline: LoadedPipeline) -> None:
    long, short = (
        params(num_inference_steps=25),
        params("a blue star on pink", 5, num_inference_steps=5),
    )
    alone = [demo_pipeline.generate(request) for request in (long, short)]
    joined: list[GenerationResult] = []
    steps_of_long_when_short_ended: list[int] = []
    with Engine(demo_pipeline, DEMO, FIFO) as engine:
        done = threading.Event()
        step = 0

        def on_short(event: Event) -> None:
            if isinstance(event, Completed):
                joined.append(event.result)
                steps_of_long_when_short_ended.append(step)
                done.set()

        def on_long(event: Event) -> None:
            nonlocal step
            if isinstance(event, Progress):
                step = event.step
                if event.step == 8:
                    engine.submit(short, on_short)

        result = engine.generate(long, on_long)
        assert done.wait(30)
        assert engine.stats().mean_batch_size > 1
    assert largest_difference([result, *joined], alone) <= TOLERANCE
    assert 8 < steps_of_long_when_short_ended[0] < 25


OFFERED = tuple(name for name in NOISE_SCHEDULERS if name not in {"pndm", "heun"})
"""Noise schedulers that can have the betas of the shipped model, whose last is 1."""


@pytest.mark.parametrize("name", OFFERED)
def test_every_noise_scheduler_generates_with_its_fewest_steps(
    demo_engine: Engine, name: str
) -> None:
    fewest = demo_engine.info.fewest_steps[name]
    request = params(noise_scheduler=name, num_inference_steps=fewest)
    assert torch.isfinite(demo_engine.generate(request).pixels).all()
    assert fewest == 1


def test_different_noise_schedulers_share_a_batch(demo_pipeline: LoadedPipeline) -> None:
    """Timesteps are integers in one and reals in another."""
    requests = [params(num_inference_steps=8, noise_scheduler=name) for name in (None, *OFFERED)]
    alone = [demo_pipeline.generate(request) for request in requests]
    with Engine(demo_pipeline, DEMO, FIFO) as engine:
        assert engine.info.noise_schedulers == OFFERED
        streams = [engine.stream(request) for request in requests]
        results = [result_of(list(stream)) for stream in streams]
        assert engine.stats().mean_batch_size > 4
    assert largest_difference(results, alone) <= TOLERANCE
    for name in ("euler_a", "dpm++"):  # the same seed gives different images
        index = OFFERED.index(name) + 1
        assert float((alone[0] - alone[index]).abs().max()) > 1e-3


def test_a_cancelled_request_is_gone_within_one_step(demo_pipeline: LoadedPipeline) -> None:
    mate = params("a yellow ring on black", 9, num_inference_steps=40)
    alone = demo_pipeline.generate(mate)
    with Engine(demo_pipeline, DEMO, EngineConfig()) as engine:
        stream = engine.stream(mate)
        number, events, moving = hold(engine, params(num_inference_steps=90))
        assert moving.wait(30)
        engine.cancel(number)
        wait_until(lambda: isinstance(events[-1], Failed))
        denoiser_calls = {
            entry.what: entry.denoiser_call
            for entry in engine.stats().log
            if entry.request == number
        }
        assert denoiser_calls["cancelled"] - denoiser_calls["cancel_requested"] <= 1
        assert isinstance(events[-1], Failed)
        assert isinstance(events[-1].error, Cancelled)
        result = result_of(list(stream))
        engine.cancel(number)  # it has ended: nothing happens
    assert largest_difference([result], [alone]) <= TOLERANCE


def test_a_waiting_request_can_be_cancelled(demo_pipeline: LoadedPipeline) -> None:
    with Engine(demo_pipeline, DEMO, EngineConfig(max_running=1)) as engine:
        first, _, moving = hold(engine, params(num_inference_steps=90))
        assert moving.wait(30)
        second, events, _ = hold(engine, params())
        wait_until(lambda: engine.stats().waiting == 1)
        engine.cancel(second)
        wait_until(lambda: isinstance(events[-1], Failed))
        assert [type(event) for event in events] == [Queued, Failed]
        engine.cancel(first)


def test_closing_the_iterator_cancels(demo_engine: Engine) -> None:
    stream = demo_engine.stream(params(num_inference_steps=90))
    for event in stream:
        if isinstance(event, Progress):
            break
    stream.close()
    wait_until(lambda: demo_engine.stats().running == 0)
    assert demo_engine.stats().log[-1].what == "cancelled"


def test_a_short_urgent_request_overtakes_a_long_one(demo_pipeline: LoadedPipeline) -> None:
    with Engine(demo_pipeline, DEMO) as engine:
        engine.generate(params(num_inference_steps=4))  # teaches the cost of a step
        long = engine.stream(params(num_inference_steps=90, width=96, height=96))
        for event in long:
            if isinstance(event, Progress) and event.step == 3:
                break
        engine.generate(params(num_inference_steps=5))
        done = [entry.request for entry in engine.stats().log if entry.what == "completed"]
        assert done == [1, 3]  # the long one still runs
        long.close()


def test_batches_keep_to_the_cap(demo_pipeline: LoadedPipeline) -> None:
    sizes: list[int] = []
    conv = demo_pipeline.denoisers["unet"].conv_in
    with Engine(demo_pipeline, DEMO, EngineConfig(max_batch_size=3, max_running=5)) as engine:
        handle = conv.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
        try:
            streams = [engine.stream(params(seed=seed)) for seed in range(7)]
            assert all(isinstance(list(stream)[-1], Completed) for stream in streams)
        finally:
            handle.remove()
    assert max(sizes) == 2 * 3  # rows: with guidance, two a request


def test_wrong_requests_are_rejected_before_they_queue(demo_engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="multiples of 8"):
        demo_engine.submit(params(width=60), lambda event: None)
    assert demo_engine.stats().log == ()


def test_closing_drains_or_drops_and_rejects_new_requests(demo_pipeline: LoadedPipeline) -> None:
    engine = Engine(demo_pipeline, DEMO)
    _, events, _ = hold(engine, params())
    engine.close()
    assert isinstance(events[-1], Completed)
    with pytest.raises(Unavailable):
        engine.submit(params(), lambda event: None)
    with pytest.raises(Unavailable):
        engine.check()

    engine = Engine(demo_pipeline, DEMO, EngineConfig(max_running=1))
    held = [hold(engine, params(num_inference_steps=90))[1] for _ in range(3)]
    engine.close(drain=False)
    for events in held:
        assert isinstance(events[-1], Failed)
        assert isinstance(events[-1].error, Unavailable)  # no client cancelled them
    assert "forward" not in vars(demo_pipeline.denoisers["unet"])


def test_limits_come_from_the_config(demo_pipeline: LoadedPipeline) -> None:
    limits = LimitsConfig(max_steps=5, max_pixels=32 * 32)
    with pytest.raises(ConfigError, match=r"from 1 to 5; it is 20\. Set model\.default_steps"):
        Engine(demo_pipeline, DEMO, EngineConfig(limits=limits))
    assert "forward" not in vars(demo_pipeline.denoisers["unet"])
    small = DEMO.model_copy(update={"default_steps": 4, "default_size_px": (32, 32)})
    pipeline = LoadedPipeline(demo_pipeline.stock, small)
    with Engine(pipeline, small, EngineConfig(limits=limits)) as engine:
        with pytest.raises(InvalidRequest, match="from 1 to 5"):
            engine.generate(params(num_inference_steps=6))
        with pytest.raises(InvalidRequest, match="such as 32x32"):
            engine.generate(params(num_inference_steps=5))


def test_the_strength_of_the_model_is_checked_too(demo_engine: Engine) -> None:
    image = Image.new("RGB", (64, 64), "red")
    assert demo_engine.info.default_strengths["image-to-image"] == 0.8
    assert demo_engine.info.max_input_images == 1
    with pytest.raises(InvalidRequest, match=r"at least one of 1 steps must run; it is 0\.8"):
        demo_engine.submit(params(num_inference_steps=1, image=image), lambda _: None)
    result = demo_engine.generate(params(num_inference_steps=5, image=image))
    assert result.params.strength == 0.8
