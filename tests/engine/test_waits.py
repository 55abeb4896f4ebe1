"""The engine on an asynchronous device: what waits for it, and what its times mean."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import pytest
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.config.speed import AccelerationConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.noise_schedulers import NOISE_SCHEDULERS
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.model.sample_requests import with_input
from serve_app.engine.predictor import Predictor
from serve_app.engine.request import Request
from serve_app.protocol.params import GenerationParams, Task
from tests.engine.device_engines import device_of_engines, placed
from tests.engine.engines import TOLERANCE, largest_difference, result_of
from tests.fakes.async_device import AsyncDevice
from tests.nightly import nightly_but
from tests.tiny_pipelines import CALL_KWARGS, FAMILIES, HEIGHT_PX, WIDTH_PX
from tests.waiting import wait_until

CONFIG = EngineConfig(max_batch_size=2, scheduling="fifo")

CALL_S = 0.05
"""Seconds of each call of a network, where time matters."""

SEED = 77


def request(seed: int = 1, steps: int = 5, **options: Any) -> GenerationParams:
    size = {"width": WIDTH_PX, "height": HEIGHT_PX}
    return GenerationParams("a red circle", seed, num_inference_steps=steps, **size, **options)


def with_scheduler(kind: type[SchedulerMixin]) -> Callable[[], DiffusionPipeline]:
    """Return a builder of Stable Diffusion with a noise scheduler of its own."""

    def build() -> DiffusionPipeline:
        pipeline = FAMILIES["stable-diffusion"]()
        own = {**pipeline.scheduler.config, "clip_sample": False}
        names = ("beta_start", "beta_end", "beta_schedule", "steps_offset", "skip_prk_steps")
        options = {name: own[name] for name in (*names, "clip_sample") if name in kind().config}
        pipeline.scheduler = kind(**options)
        return pipeline

    return build


def loaded(pipeline: DiffusionPipeline, family: str = "") -> tuple[LoadedPipeline, ModelConfig]:
    model = ModelConfig.model_validate(
        {
            "id": "m",
            "device": "cpu",
            "call_kwargs": CALL_KWARGS.get(family, {}),
            "default_size_px": (WIDTH_PX, HEIGHT_PX),
        }
    )
    return LoadedPipeline(pipeline, model), model


def together(engine: Engine, requests: list[GenerationParams]) -> list[Any]:
    return [result_of(list(stream)) for stream in [engine.stream(one) for one in requests]]


def waits_between_calls(device: AsyncDevice, denoiser: str) -> list[str]:
    """Return what waited between the first and the last denoiser call."""
    calls = [index for index, line in enumerate(device.log) if line == f"call {denoiser}"]
    return [line for line in device.log[calls[0] : calls[-1]] if line.startswith("wait")]


@dataclass
class Served:
    """An engine on the device, with a pipeline of its own, and the same pipeline on the CPU."""

    device: AsyncDevice
    engine: Engine
    on_cpu: LoadedPipeline


@pytest.fixture(scope="module")
def ddim() -> Iterator[Served]:
    """An engine whose model's own noise scheduler may become each of the others."""
    build = with_scheduler(diffusers.DDIMScheduler)
    with pytest.MonkeyPatch.context() as monkeypatch, device_of_engines(monkeypatch) as device:
        pipeline, model = loaded(placed(build, device))
        with Engine(pipeline, model, CONFIG) as engine:
            yield Served(device, engine, loaded(build())[0])


@pytest.mark.parametrize("task", ["text-to-image", "image-to-image", "inpainting"])
@pytest.mark.parametrize("name", NOISE_SCHEDULERS)
def test_nothing_waits_between_two_denoiser_calls(ddim: Served, name: str, task: Task) -> None:
    requests = [with_input(request(seed, noise_scheduler=name), task, 0.8) for seed in (1, 2)]
    ddim.device.log.clear()
    results = together(ddim.engine, requests)
    assert waits_between_calls(ddim.device, "unet") == []
    images = [replace(one, pixels=one.pixels.cpu()) for one in results]
    alone = [ddim.on_cpu.generate(one) for one in requests]
    assert largest_difference(images, alone) <= TOLERANCE


@pytest.fixture
def slow_calls(ddim: Served) -> Iterator[Served]:
    """The same, with calls that take long, and nothing learned of it yet."""
    ddim.device.call_s = CALL_S
    for known in (ddim.engine.cost.between_s, ddim.engine.cost.call_s, ddim.engine.cost.decode_s):
        known.clear()
    ddim.engine.cost.calls_per_step = 1.0
    yield ddim
    ddim.device.call_s = 0.0


@pytest.mark.parametrize("requests", [1, 2])
def test_extrapolation_keeps_the_device_busy(
    slow_calls: Served, monkeypatch: pytest.MonkeyPatch, requests: int
) -> None:
    """A decision reads a number of the call before the last one, so that one is there to run."""
    without_limit = AccelerationConfig(fast_error=1.0)
    monkeypatch.setattr(slow_calls.engine._pipeline, "acceleration", without_limit)
    device = slow_calls.device
    monkeypatch.setattr(device, "launch_s", 4e-5)  # the host works for 10 ms in each step
    device.log.clear()
    sent = [request(seed, steps=20, acceleration="fast") for seed in range(requests)]
    results = together(slow_calls.engine, sent)
    assert waits_between_calls(device, "unet") == []
    assert all(one.calls.extrapolated >= 5 for one in results)
    made = max(one.calls.made for one in results)
    assert results[0].timings.denoise_s == pytest.approx(made * CALL_S, rel=0.01)


def stock_waits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pipelines wait for the device as they do without this engine."""
    monkeypatch.setattr(engine._pipeline, "timesteps_on_cpu", False)
    monkeypatch.setattr(engine._runner, "_copies", contextlib.nullcontext())
    monkeypatch.setattr("serve_app.engine.model.pipeline.use_linear_unipc", lambda _: None)


@pytest.mark.parametrize("waits", [False, True])
def test_a_wait_between_two_calls_is_not_learned_as_work(
    slow_calls: Served, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, engine = slow_calls.device, slow_calls.engine
    if waits:
        stock_waits(engine, monkeypatch)
    device.log.clear()
    together(engine, [request(steps=20, noise_scheduler="ddim")])
    assert bool(waits_between_calls(device, "unet")) == waits
    size = (WIDTH_PX, HEIGHT_PX)
    assert engine.cost.predict_call(size) == pytest.approx(CALL_S, rel=0.2)
    assert engine.cost.predict_between(size) < 0.1 * CALL_S
    # What it learned predicts the next one.
    predicted_s = engine.cost.predict_steps(size, 20)
    [again] = together(engine, [request(steps=20, noise_scheduler="ddim")])
    assert predicted_s == pytest.approx(again.timings.denoise_s, rel=0.1)


def test_an_image_is_done_when_the_device_is(
    slow_calls: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's thread has launched it earlier; the forecast and deadlines must not count so."""
    device, engine = slow_calls.device, slow_calls.engine
    device.log.clear()
    done: list[tuple[float, float]] = []
    learn = Predictor.learn_from

    def spy(predictor: Predictor, request: Request, took_s: float) -> None:
        if request.params.seed == SEED:  # the last image of another test may be done only now
            done.append((request.accepted_at, took_s))
        learn(predictor, request, took_s)

    monkeypatch.setattr(Predictor, "learn_from", spy)
    busy_s = device.busy_s
    [result] = together(engine, [request(SEED)])
    wait_until(lambda: bool(done))
    [(accepted_at, took_s)] = done
    busy_s = device.busy_s - busy_s
    assert took_s >= busy_s
    assert took_s == pytest.approx(busy_s, rel=0.2)
    assert accepted_at + took_s == pytest.approx(device.free_at, abs=0.2 * CALL_S)
    steps = sum(line == "call unet" for line in device.log)
    assert result.timings.denoise_s == pytest.approx(steps * CALL_S, rel=0.1)


@pytest.mark.slow
def test_nothing_waits_with_a_scheduler_that_draws_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    build = with_scheduler(diffusers.LCMScheduler)
    with device_of_engines(monkeypatch) as device:
        pipeline, model = loaded(placed(build, device))
        with Engine(pipeline, model, CONFIG) as engine:
            device.log.clear()
            together(engine, [request(seed) for seed in (1, 2)])
        assert waits_between_calls(device, "unet") == []


@pytest.mark.slow
@pytest.mark.parametrize("family", nightly_but(("flux", "pixart-sigma"), FAMILIES))
def test_no_family_waits_between_two_denoiser_calls(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with device_of_engines(monkeypatch) as device:
        pipeline, model = loaded(placed(FAMILIES[family], device), family)
        with Engine(pipeline, model, CONFIG) as engine:
            assert pipeline.timesteps_on_cpu
            device.log.clear()
            together(engine, [request(seed) for seed in (1, 2)])
        assert waits_between_calls(device, next(iter(pipeline.denoisers))) == []
        assert not pipeline.timesteps_on_cpu  # of no use without an engine


class JoinedTimesteps(diffusers.EulerDiscreteScheduler):
    """A noise scheduler that joins its timesteps with latents, which fails if they are apart."""

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        joined = sample + 0 * timestep.expand(len(sample)).view(-1, 1, 1, 1)
        return super().scale_model_input(joined, timestep)


@pytest.mark.slow
def test_timesteps_stay_on_the_device_where_a_pipeline_needs_them_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build = with_scheduler(JoinedTimesteps)
    with device_of_engines(monkeypatch) as device:
        pipeline, model = loaded(placed(build, device))
        with Engine(pipeline, model, CONFIG) as engine:
            assert not pipeline.timesteps_on_cpu
            assert engine.info.sharing == "batched"
            together(engine, [request()])
    assert "timesteps on the device" in caplog.text
