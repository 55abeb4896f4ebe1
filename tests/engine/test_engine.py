"""The engine on the shipped model: batched equals alone, failures stay isolated, none is lost."""

import gc
import queue
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from serve_app.config.models import EngineConfig, LimitsConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.noise_schedulers import NOISE_SCHEDULERS
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.scheduling.policies import Fifo
from serve_app.engine.startup import certification
from serve_app.errors import (
    Cancelled,
    ConfigError,
    GenerationFailed,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from serve_app.protocol.events import Completed, Event, Failed, GenerationResult, Progress, Queued
from serve_app.protocol.params import INITIAL, GenerationParams, RequestContext
from tests.conftest import DEMO, FIFO
from tests.waiting import wait_until

TOLERANCE = 1e-5
"""Largest difference of a pixel in [0, 1] between batched and alone, in float32 on a CPU."""


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
    return certification.largest_difference([result.pixels for result in results], images)


def has_stopped(engine: Engine) -> bool:
    try:
        engine.check()
    except Unavailable:
        return True
    return False


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
    assert result.params == params(num_inference_steps=4)
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
            places.append(inbox.get(timeout=30))
            if inbox is events[0]:
                assert isinstance(inbox.get(timeout=30), Progress)  # it runs
        assert [place.position for place in places if isinstance(place, Queued)] == [0, 0, 1]
        for number in numbers:
            engine.locate(number)
        told: Event = Progress(0, 100)
        while isinstance(told, Progress) and told.eta_s is None:
            told = events[0].get(timeout=30)
        assert isinstance(told, Progress)
        assert told.total_steps == 100
        second, third = events[1].get(timeout=30), events[2].get(timeout=30)
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


@pytest.mark.parametrize("name", NOISE_SCHEDULERS)
def test_every_noise_scheduler_generates_with_its_fewest_steps(
    demo_engine: Engine, name: str
) -> None:
    fewest = demo_engine.info.fewest_steps[name]
    request = params(noise_scheduler=name, num_inference_steps=fewest)
    assert torch.isfinite(demo_engine.generate(request).pixels).all()
    assert fewest == (4 if name == "pndm" else 1)  # Runge-Kutta, to begin with


def test_different_noise_schedulers_share_a_batch(demo_pipeline: LoadedPipeline) -> None:
    """Timesteps are integers in one and reals in another; some call the denoiser twice a step."""
    assert demo_pipeline.noise_schedulers == tuple(NOISE_SCHEDULERS)
    requests = [
        params(num_inference_steps=8, noise_scheduler=name)
        for name in (None, *demo_pipeline.noise_schedulers)
    ]
    alone = [demo_pipeline.generate(request) for request in requests]
    with Engine(demo_pipeline, DEMO, FIFO) as engine:
        streams = [engine.stream(request) for request in requests]
        results = [result_of(list(stream)) for stream in streams]
        assert engine.stats().mean_batch_size > 4
    assert largest_difference(results, alone) <= TOLERANCE
    for name in ("euler", "dpm++", "pndm"):  # the same seed gives different images
        index = demo_pipeline.noise_schedulers.index(name) + 1
        assert float((alone[0] - alone[index]).abs().max()) > 1e-3


def hold(engine: Engine, request: GenerationParams) -> tuple[int, list[Event], threading.Event]:
    """Submit; return the number, the events so far, and an event that is set after three steps."""
    events: list[Event] = []
    moving = threading.Event()

    def on_event(event: Event) -> None:
        events.append(event)
        if isinstance(event, Progress) and event.step == 3:
            moving.set()

    return engine.submit(request, on_event), events, moving


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


def break_rows_of(
    pipeline: LoadedPipeline, is_bad: Callable[[torch.Tensor], bool]
) -> Callable[[], None]:
    """Make the network raise for batches with a bad row; return a handle that undoes it."""
    first = pipeline.denoisers["unet"].conv_in

    def check(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if is_bad(args[0]):
            raise RuntimeError("a bad row")

    return first.register_forward_pre_hook(check).remove


def test_an_error_in_one_request_fails_no_other(demo_pipeline: LoadedPipeline) -> None:
    good = [params("a red star on white", seed, num_inference_steps=8) for seed in range(4)]
    alone = [demo_pipeline.generate(request) for request in good]
    bad = params("a blue ring on white", 666, num_inference_steps=8)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(666))
    with Engine(demo_pipeline, DEMO) as engine:
        mend = break_rows_of(
            demo_pipeline, lambda rows: any(torch.equal(row, latents[0]) for row in rows)
        )
        try:
            streams = [engine.stream(request) for request in [*good[:2], bad, *good[2:]]]
            ends = [list(stream)[-1] for stream in streams]
        finally:
            mend()
    failed = ends.pop(2)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, GenerationFailed)
    assert "a bad row" in str(failed.error)
    assert largest_difference([result_of([end]) for end in ends], alone) <= TOLERANCE


def test_a_lost_device_stops_the_engine(demo_pipeline: LoadedPipeline) -> None:
    """Every later call would fail as well: another process must take over."""

    def lost(_: torch.nn.Module, args: object) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    engine = Engine(demo_pipeline, DEMO)
    handle = demo_pipeline.denoisers["unet"].conv_in.register_forward_pre_hook(lost)
    try:
        event = list(engine.stream(params()))[-1]
        wait_until(lambda: has_stopped(engine))
    finally:
        handle.remove()
    assert isinstance(event, Failed)
    assert isinstance(event.error, Unavailable)
    with pytest.raises(Unavailable, match="illegal memory access"):
        engine.check()


def test_a_failed_request_leaves_nothing_in_memory(demo_pipeline: LoadedPipeline) -> None:
    """A request that ran out of memory must not keep its tensors."""
    held: list[weakref.ref[torch.Tensor]] = []

    def fail(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        held.append(weakref.ref(args[0]))
        raise torch.OutOfMemoryError("out of memory")

    with Engine(demo_pipeline, DEMO) as engine:
        handle = demo_pipeline.denoisers["unet"].conv_in.register_forward_pre_hook(fail)
        gc.disable()  # memory must be free without a collection
        try:
            streams = [engine.stream(params(seed=seed)) for seed in range(3)]
            events = [list(stream)[-1] for stream in streams]
            wait_until(lambda: not any(ref() is not None for ref in held), what="release")
        finally:
            gc.enable()
            handle.remove()
        assert all(isinstance(event, Failed) for event in events)
        assert len(held) >= 3
        assert engine.generate(params(num_inference_steps=2)).image.size == (64, 64)


def test_out_of_memory_halves_the_batch_and_fails_no_request(demo_pipeline: LoadedPipeline) -> None:
    requests = [params(seed=seed, num_inference_steps=6) for seed in range(9)]
    alone = [demo_pipeline.generate(request) for request in requests]
    sizes: list[int] = []

    def only_three_fit(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        sizes.append(args[0].shape[0] // 2)  # with guidance, two rows a request
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with Engine(demo_pipeline, DEMO, FIFO) as engine:
        handle = demo_pipeline.denoisers["unet"].conv_in.register_forward_pre_hook(only_three_fit)
        try:
            streams = [engine.stream(request) for request in requests]
            results = [result_of(list(stream)) for stream in streams]
        finally:
            handle.remove()
    assert largest_difference(results, alone) <= TOLERANCE
    assert sum(size > 3 for size in sizes) <= 3  # the cap is learned, not tried again and again
    assert max(sizes[-6:]) <= 3


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


def test_a_receiver_that_raises_fails_no_request(
    demo_engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError("receiver")

    demo_engine.submit(params(), broken)
    assert demo_engine.generate(params()).image.size == (64, 64)
    assert "the receiver of its events failed" in caplog.text


def test_batches_keep_to_the_cap(demo_pipeline: LoadedPipeline) -> None:
    sizes: list[int] = []
    unet = demo_pipeline.denoisers["unet"]
    handle = unet.conv_in.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    try:
        with Engine(demo_pipeline, DEMO, EngineConfig(max_batch_size=3, max_running=5)) as engine:
            streams = [engine.stream(params(seed=seed)) for seed in range(7)]
            sizes.clear()
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


def test_no_request_hangs_when_the_engine_thread_dies(
    demo_pipeline: LoadedPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Fifo):
        def choose(self, now: float, cap: Any) -> Any:
            raise KeyError("policy")

    engine = Engine(demo_pipeline, DEMO, policy=Broken())
    event = list(engine.stream(params()))[-1]
    assert isinstance(event, Failed)
    assert isinstance(event.error, Unavailable)
    wait_until(lambda: has_stopped(engine))
    with pytest.raises(Unavailable, match="policy"):
        engine.check()


def test_limits_come_from_the_config(demo_pipeline: LoadedPipeline) -> None:
    limits = LimitsConfig(max_steps=5, max_pixels=32 * 32)
    with pytest.raises(ConfigError, match=r"from 1 to 5\. Set model\.default_steps"):
        Engine(demo_pipeline, DEMO, EngineConfig(limits=limits))
    assert "forward" not in vars(demo_pipeline.denoisers["unet"])
    small = DEMO.model_copy(update={"default_steps": 4, "default_size_px": (32, 32)})
    pipeline = LoadedPipeline(demo_pipeline.stock, small)
    with Engine(pipeline, small, EngineConfig(limits=limits)) as engine:
        with pytest.raises(InvalidRequest, match="from 1 to 5"):
            engine.generate(params(num_inference_steps=6))
        with pytest.raises(InvalidRequest, match="such as 32x32"):
            engine.generate(params(num_inference_steps=5))


def test_the_last_slots_are_for_requests_that_can_be_on_time(demo_pipeline: LoadedPipeline) -> None:
    config = EngineConfig(max_running=8, slo_scale=1e-3, max_backlog_s=1e6)
    with Engine(demo_pipeline, DEMO, config) as engine:
        late = [engine.stream(params(seed=seed, num_inference_steps=40)) for seed in range(10)]
        wait_until(lambda: engine.stats().running == 7)
        urgent = engine.stream(params(seed=11, num_inference_steps=3, deadline_s=600.0))
        result_of(list(urgent))
        assert engine.stats().waiting >= 3  # it waited for none of them
        for stream in late:
            stream.close()


def test_a_tokenizer_error_fails_only_its_own_request(
    demo_pipeline: LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_prompt = demo_pipeline.read_prompt

    def fail(request: GenerationParams) -> tuple[int, tuple[str, ...]]:
        if request.seed == 13:
            raise TypeError("no such text")
        return read_prompt(request)

    monkeypatch.setattr(demo_pipeline, "read_prompt", fail)
    with Engine(demo_pipeline, DEMO) as engine:
        with pytest.raises(GenerationFailed, match="no such text"):
            engine.generate(params(seed=13))
        engine.generate(params(num_inference_steps=1))


def test_the_strength_of_the_model_is_checked_too(demo_engine: Engine) -> None:
    image = Image.new("RGB", (64, 64), "red")
    assert demo_engine.info.default_strengths["image-to-image"] == 0.8
    with pytest.raises(InvalidRequest, match=r"leave one of 1 steps to run; it is 0\.8"):
        demo_engine.submit(params(num_inference_steps=1, image=image), lambda _: None)
    result = demo_engine.generate(params(num_inference_steps=5, image=image))
    assert result.params.strength == 0.8


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
    return number, inbox.get(timeout=30), inbox


def rejected(event: Event) -> Overloaded:
    assert isinstance(event, Failed), event
    assert isinstance(event.error, Overloaded), event.error
    return event.error


def test_a_deadline_that_cannot_be_met_is_rejected(demo_pipeline: LoadedPipeline) -> None:
    with Engine(demo_pipeline, DEMO) as engine:
        long_s = measured(engine)
        numbers = [submitted(engine, params(num_inference_steps=100))[0] for _ in range(2)]
        short = params(num_inference_steps=50)
        error = rejected(submitted(engine, replace(short, deadline_s=0.6 * long_s))[1])
        assert error.param == "deadline_s"
        assert error.retry_after_s is not None
        assert 1 <= error.retry_after_s < 3 * long_s + 1
        assert 0 < error.work_s < long_s
        assert str(error).startswith("about ")
        assert "cannot be done within" in str(error)
        assert [entry.what for entry in engine.stats().log if entry.request > numbers[-1]] == [
            "rejected"
        ]
        assert isinstance(submitted(engine, replace(short, deadline_s=100.0))[1], Queued)
        assert isinstance(submitted(engine, short)[1], Queued)  # it has no deadline
        engine.close(drain=False)


def test_an_infeasible_deadline_is_an_invalid_request(
    demo_pipeline: LoadedPipeline,
) -> None:
    with Engine(demo_pipeline, DEMO) as engine:
        long_s = measured(engine)
        before = engine.replica_load()
        _, event, _ = submitted(engine, params(num_inference_steps=100, deadline_s=long_s / 4))
        assert isinstance(event, Failed)
        assert isinstance(event.error, InvalidRequest)
        assert event.error.param == "deadline_s"
        assert "on an idle replica" in str(event.error)
        # More replicas would not help, so it is no offered load.
        assert engine.replica_load().arrival_rate <= before.arrival_rate
        assert engine.replica_load().mean_work_s == before.mean_work_s


def test_no_later_request_makes_an_earlier_one_miss_its_deadline(
    demo_pipeline: LoadedPipeline,
) -> None:
    with Engine(demo_pipeline, DEMO) as engine:
        long_s = measured(engine)
        _, event, _ = submitted(engine, params(num_inference_steps=100, deadline_s=1.5 * long_s))
        assert isinstance(event, Queued)
        # Another size, and more urgent: it would go first, and make the other late.
        urgent = params(num_inference_steps=60, width=96, deadline_s=1.4 * long_s)
        error = rejected(submitted(engine, urgent)[1])
        assert "would make another request miss its deadline" in str(error)
        engine.close(drain=False)


def test_a_backlog_has_a_limit_and_a_reserve_for_retries(
    demo_pipeline: LoadedPipeline,
) -> None:
    limit_s = 4.0
    config = EngineConfig(max_backlog_s=limit_s, max_running=2)
    with Engine(demo_pipeline, DEMO, config) as engine:
        measured(engine)
        request = params(num_inference_steps=30)

        def filled(context: RequestContext) -> list[Event]:
            events = []
            while len(events) < 50:
                events.append(submitted(engine, request, context)[1])
                if isinstance(events[-1], Failed):
                    break
            return events

        first = filled(INITIAL)
        error = rejected(first[-1])
        assert "the queue is full" in str(error)
        assert error.retry_after_s is not None
        assert error.retry_after_s >= 1
        load = engine.replica_load()
        assert 0.8 * limit_s < load.backlog_s < 2 * limit_s
        second = filled(RequestContext(is_retry=True))
        rejected(second[-1])
        assert 1.6 * limit_s < engine.replica_load().backlog_s < 4 * limit_s
        # Offered load counts a rejected request once, and its retry not.
        assert 30 * load.arrival_rate > load.backlog_s
        assert engine.replica_load().arrival_rate <= load.arrival_rate
        engine.close(drain=False)


def test_an_idle_engine_admits_a_request_longer_than_its_limit(
    demo_pipeline: LoadedPipeline,
) -> None:
    config = EngineConfig(max_backlog_s=0.001)
    with Engine(demo_pipeline, DEMO, config) as engine:
        measured(engine)
        order = RequestContext(order="ten images")
        ten = [submitted(engine, params(seed=seed), order) for seed in range(10)]
        assert all(isinstance(event, Queued) for _, event, _ in ten)
        rejected(submitted(engine, params())[1])
        rejected(submitted(engine, params(), RequestContext(order="others"))[1])
        wait_until(lambda: not engine.replica_load().backlog_s)
        assert isinstance(submitted(engine, params())[1], Queued)


def test_siblings_that_cannot_be_done_in_time_are_rejected(
    demo_pipeline: LoadedPipeline,
) -> None:
    """Also on an idle engine, which admits each of them alone, even if it may be a little late."""
    config = EngineConfig(max_batch_size=1)
    with Engine(demo_pipeline, DEMO, config) as engine:
        long_s = measured(engine)
        long = params(num_inference_steps=100, deadline_s=0.8 * long_s)
        number, event, inbox = submitted(engine, long)
        assert isinstance(event, Queued)
        engine.cancel(number)
        inbox.get(timeout=30)
        order = RequestContext(order="ten images")
        long = replace(long, deadline_s=2.5 * long_s)
        ten = [submitted(engine, replace(long, seed=seed), order)[1] for seed in range(10)]
        assert isinstance(ten[0], Queued)
        for event in ten[3:]:
            error = rejected(event)
            assert error.param == "deadline_s"
            assert "the images of this request cannot all be done within" in str(error)
        engine.close(drain=False)


def test_rejections_name_reserved_and_low_priority_work(
    demo_pipeline: LoadedPipeline,
) -> None:
    with Engine(demo_pipeline, DEMO, EngineConfig(max_backlog_s=20.0)) as engine:
        long_s = measured(engine)
        long = params(num_inference_steps=100)
        submitted(engine, long)
        error = rejected(submitted(engine, long, RequestContext(reserved_s=30.0))[1])
        assert "30.0 s are reserved for retries" in str(error)
        soon = replace(long, deadline_s=5 * long_s)
        error = rejected(submitted(engine, soon, RequestContext(reserved_s=15.0))[1])
        assert "15.0 s are reserved for retries" in str(error)
        assert "cannot be done within" in str(error)
        engine.close(drain=False)
    limits = LimitsConfig(max_deadline_s=0.01)
    with Engine(demo_pipeline, DEMO, EngineConfig(limits=limits)) as engine:
        measured(engine)
        batch = params(num_inference_steps=100, priority="batch")
        submitted(engine, batch)
        error = rejected(submitted(engine, batch)[1])
        assert "about 0.0 s of work are queued" not in str(error)
        engine.close(drain=False)


def test_time_on_the_way_counts_for_the_deadline(demo_pipeline: LoadedPipeline) -> None:
    with Engine(demo_pipeline, DEMO) as engine:
        long_s = measured(engine)
        long = params(num_inference_steps=100, deadline_s=2 * long_s)
        rejected(submitted(engine, long, RequestContext(sent_at=time.time() - 1.8 * long_s))[1])
        _, event, inbox = submitted(
            engine, params(num_inference_steps=1), RequestContext(sent_at=time.time() - 3.0)
        )
        while not isinstance(event, Completed):
            event = inbox.get(timeout=30)
        assert event.result.timings.queue_s < 3  # timings do not use the clocks of two machines


def test_low_priority_work_yields_at_the_next_step_and_fills_idle_time(
    demo_pipeline: LoadedPipeline,
) -> None:
    """It does not slow the others either."""
    with Engine(demo_pipeline, DEMO) as engine:
        measured(engine)
        batch = params(num_inference_steps=100, width=96, height=96, priority="batch")
        held = [hold(engine, replace(batch, seed=seed)) for seed in range(3)]
        assert held[0][2].wait(60)

        def step_of(number: int) -> int:
            steps = [e.step for e in held[number][1] if isinstance(e, Progress)]
            return max(steps, default=0)

        before = sum(step_of(number) for number in range(3))
        engine.generate(params(num_inference_steps=20))
        # At most the call that was running for each of them, and the one after it.
        assert sum(step_of(number) for number in range(3)) <= before + 6
        wait_until(lambda: sum(step_of(number) for number in range(3)) > before + 6)
        assert engine.replica_load().batch_backlog_s > 0
        assert engine.replica_load().backlog_s == 0
        engine.close(drain=False)


def test_low_priority_work_takes_half_of_the_slots(demo_pipeline: LoadedPipeline) -> None:
    with Engine(demo_pipeline, DEMO, EngineConfig(max_running=4)) as engine:
        for seed in range(6):
            submitted(engine, params(num_inference_steps=100, seed=seed, priority="batch"))
        wait_until(lambda: engine.stats().running == 2)
        engine.generate(params(num_inference_steps=5))
        assert engine.stats().waiting == 4
        engine.close(drain=False)


def test_an_error_while_admitting_ends_the_engine_and_every_request(
    demo_pipeline: LoadedPipeline,
) -> None:
    """Such an error is a bug of the engine: no request may hang because of it."""

    class Broken(Fifo):
        def order(self, now: float) -> Any:
            raise KeyError("policy")

    engine = Engine(demo_pipeline, DEMO, policy=Broken())
    [event] = engine.stream(params())
    assert isinstance(event, Failed)
    assert isinstance(event.error, GenerationFailed)
    wait_until(lambda: has_stopped(engine))
    with pytest.raises(Unavailable):
        engine.submit(params(), lambda _: None)
    # The pipeline has its own modules back.
    assert torch.isfinite(demo_pipeline.generate(params(num_inference_steps=1))).all()


def test_waiting_for_memory_teaches_no_costs(demo_pipeline: LoadedPipeline) -> None:
    """A call that is queued again is no time between two denoiser calls."""
    failed = 0

    def scarce(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal failed
        if failed < 4 and engine.stats().running == 2:
            failed += 1
            raise torch.OutOfMemoryError("too little memory")

    with Engine(demo_pipeline, DEMO, FIFO) as engine:
        engine.generate(params(num_inference_steps=8))
        known_s = engine.cost.predict_between((64, 64))
        handle = demo_pipeline.denoisers["unet"].conv_in.register_forward_pre_hook(scarce)
        try:
            streams = [engine.stream(params(num_inference_steps=8)) for _ in range(2)]
            assert all(isinstance(list(stream)[-1], Completed) for stream in streams)
        finally:
            handle.remove()
        assert failed
        assert engine.cost.predict_between((64, 64)) > known_s / 4
