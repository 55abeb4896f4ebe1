"""Requests whose denoiser calls are extrapolated, in an engine with others."""

import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
from PIL import Image
from torch import nn

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.config.speed import Acceleration, AccelerationConfig, SpeedConfig
from serve_app.engine.batching.extrapolation import Extrapolator
from serve_app.engine.engine import Engine
from serve_app.engine.metrics import EngineMetrics
from serve_app.engine.model import speed
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.predictor import Predictor
from serve_app.engine.request import Request
from serve_app.engine.scheduling.cost import CostModel, Measurement
from serve_app.engine.startup.comparison import psnr_db
from serve_app.errors import Cancelled, InvalidRequest
from serve_app.protocol.events import Failed, GenerationResult, Progress
from serve_app.protocol.params import INITIAL, GenerationParams
from tests.conftest import DEMO, FIFO
from tests.engine.engines import TOLERANCE, hold, largest_difference, params, result_of
from tests.tiny_pipelines import CALL_KWARGS, FAMILIES, HEIGHT_PX, WIDTH_PX
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("reused_starts")

STEPS = 20


@pytest.fixture(scope="module")
def engine(demo_pipeline: LoadedPipeline) -> Iterator[Engine]:
    with Engine(demo_pipeline, DEMO, FIFO) as engine:
        yield engine


def request(seed: int, **options: object) -> GenerationParams:
    return params(seed=seed, num_inference_steps=STEPS, **options)


@pytest.fixture(autouse=True)
def _memory_of_other_tests() -> None:
    gc.collect()
    assert not in_memory()


def in_memory() -> list[object]:
    return [one for one in gc.get_objects() if type(one) is Extrapolator]


def mixed() -> list[GenerationParams]:
    """Return requests of all levels and tasks, and with noise schedulers of several kinds."""
    image = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    return [
        request(1, acceleration="none"),
        request(2, acceleration="balanced"),
        request(3, acceleration="fast", prompt="two yellow rings on a purple background"),
        request(4, acceleration="fast", guidance_scale=1.0),
        request(5, acceleration="fast", image=image, strength=0.8),
        request(6, acceleration="balanced", image=image, mask_image=mask, strength=0.9),
        request(7, acceleration="fast", noise_scheduler="dpm++"),
        request(8, acceleration="fast", noise_scheduler="euler_a"),
    ]


def test_together_as_alone(
    engine: Engine, demo_pipeline: LoadedPipeline, report: Callable[[str], None]
) -> None:
    requests = mixed()
    before = engine.stats()
    streams = [engine.stream(one) for one in requests]
    together = [result_of(list(stream)) for stream in streams]
    after = engine.stats()
    alone = [engine.generate(one) for one in requests]
    apart = [
        float((one.pixels - two.pixels).abs().max())
        for one, two in zip(together, alone, strict=True)
    ]
    worst = max(apart)
    counts = ", ".join(f"{one.calls.made}+{one.calls.extrapolated}" for one in together)
    report(f"extrapolation: calls {counts}, largest difference from alone {worst:.1e}")
    # A line over three steps multiplies the rounding of its ends.
    assert worst <= TOLERANCE
    assert statistics.median(apart) <= TOLERANCE / 2
    assert [one.calls for one in together] == [one.calls for one in alone]
    assert [sum(one.calls) for one in together] == [one.params.steps_to_run for one in together]
    assert after.steps - before.steps == sum(one.calls.made for one in together)
    none, balanced, fast, *others, stochastic = [one.calls.extrapolated for one in together]
    assert none == stochastic == 0
    assert 0 < balanced < fast
    assert all(others)
    some = (0, 2, 7)
    results, exact = (
        [together[i] for i in some],
        [demo_pipeline.generate(requests[i]) for i in some],
    )
    assert largest_difference(results[::2], exact[::2]) <= TOLERANCE
    assert 20 < psnr_db(results[1].pixels, exact[1][0]) < 60
    assert not in_memory()


@pytest.mark.slow
@pytest.mark.usefixtures("every_batch_pays")
def test_together_as_alone_compiled_and_in_eight_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without torch's C++ compiler, and with a threshold that outputs of random weights meet."""
    monkeypatch.setattr(speed, "check_compiler", lambda _: None)
    by_inductor = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", partialmethod(by_inductor, backend="aot_eager"))
    FAMILIES["flux"]().save_pretrained(tmp_path)
    size = WIDTH_PX, HEIGHT_PX
    model = ModelConfig(
        id="tiny",
        path=str(tmp_path),
        device="cpu",
        default_size_px=size,
        default_steps=3,
        call_kwargs=CALL_KWARGS["flux"],
        speed=SpeedConfig(compile=True, quantize="int8"),
        acceleration=AccelerationConfig(fast_error=1.0),
    )
    config = EngineConfig(
        scheduling="fifo", max_batch_size=2, warmup_sizes_px=(size,), profile_path="none"
    )
    levels: tuple[Acceleration, ...] = ("none", "fast", "fast")
    requests = [
        GenerationParams(
            "a cat",
            seed,
            width=WIDTH_PX,
            height=HEIGHT_PX,
            num_inference_steps=12,
            guidance_scale=(1.0, 5.0)[seed % 2],
            acceleration=level,
        )
        for seed, level in enumerate(levels)
    ]
    with Engine.load(model, config) as engine:
        streams = [engine.stream(one) for one in requests]
        together = [result_of(list(stream)) for stream in streams]
        assert engine.stats().mean_batch_size > 1
        alone = [engine.generate(one) for one in requests]
    assert [one.calls for one in together] == [one.calls for one in alone]
    assert [bool(one.calls.extrapolated) for one in together] == [False, True, True]
    assert largest_difference(together, [one.pixels[None] for one in alone]) <= TOLERANCE


def test_every_step_is_reported(engine: Engine) -> None:
    events = list(engine.stream(request(1, acceleration="fast", preview_steps=(9, 10))))
    progress = [one for one in events if isinstance(one, Progress)]
    assert progress == [Progress(step, STEPS) for step in range(1, STEPS + 1)]
    assert result_of(events).calls.extrapolated
    assert result_of(events).params.acceleration == "fast"


def test_fewer_calls_are_expected_once_such_a_request_has_ended() -> None:
    cost = CostModel(4)
    cost.measured((64, 64), Measurement({1: 1.0}, encode_s=0.5, decode_s=0.25))
    predictor = Predictor(cost, EngineMetrics("m"))

    def at(steps_done: int, made: int, level: Acceleration = "fast", steps: int = STEPS) -> Request:
        resolved = params(num_inference_steps=steps, acceleration=level)
        one = Request(1, resolved, INITIAL, lambda event: None, 0.0)
        one.steps_done, one.calls, one.encode_s, one.non_denoiser_s = steps_done, made, 0.5, 0.25
        return one

    assert predictor.remaining_s(at(0, 0)) == 20.25  # nothing is known, so all calls
    ended = at(20, 8)
    ended.extrapolated = 12
    predictor.learn_from(ended, 10.0)
    assert cost.calls_per_step == 1.0
    for one, calls in (
        (at(0, 0), 8),
        (at(5, 4), 4),
        (at(12, 9), 1),  # more calls than expected, and the last one comes
        (at(19, 7), 1),  # fewer than expected, and only one can come
        (at(0, 0, "none"), 20),
        (at(0, 0, "balanced"), 20),
        (at(0, 0, steps=30), 12),  # the share of fewer steps, which is no less
        (at(0, 0, steps=10), 10),
    ):
        assert predictor.remaining_s(one) == pytest.approx(calls + 0.25)
        assert predictor.completion_s([one])[0] == pytest.approx(
            calls + 0.25 + 0.5 * (not one.calls), rel=0.05
        )


def test_a_cancelled_request_frees_its_history(engine: Engine) -> None:
    long = replace(request(1, acceleration="fast"), num_inference_steps=100)
    number, events, moving = hold(engine, long)
    assert moving.wait(30)
    engine.cancel(number)
    wait_until(lambda: isinstance(events[-1], Failed))
    assert isinstance(events[-1].error, Cancelled)
    wait_until(lambda: not in_memory())


def test_the_default_of_the_config_holds_for_requests_that_name_none(
    demo_pipeline: LoadedPipeline,
) -> None:
    model = DEMO.model_copy(update={"acceleration": AccelerationConfig(default="fast")})

    def calls(engine: Engine, **options: object) -> GenerationResult:
        return engine.generate(request(1, **options))

    with Engine(demo_pipeline, model, FIFO) as engine:
        assert engine.info.default_acceleration == "fast"
        assert calls(engine).calls.extrapolated
        assert not calls(engine, acceleration="none").calls.extrapolated
        with pytest.raises(InvalidRequest, match="one of none, balanced, fast; it is 'faster'"):
            calls(engine, acceleration="faster")
