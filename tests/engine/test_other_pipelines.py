"""Pipelines beyond the tested families: what is certified, and what is rejected at the start.

docs/models.md describes these cases.
"""

import queue
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionUpscalePipeline,
)
from PIL import Image

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.startup.comparison import largest_difference
from serve_app.errors import InvalidRequest, ModelLoadError
from serve_app.protocol.events import Completed, Event, Failed, Progress, Queued
from serve_app.protocol.params import GenerationParams
from tests.conftest import FIFO
from tests.more_pipelines import CERTIFIED, FEW_TOKENS, bria_fibo, kontext, ltx
from tests.tiny_ernie import ernie_image
from tests.tiny_networks import CLIP_DIM, LATENT_CHANNELS, draw_weights, unet
from tests.tiny_pipelines import stable_diffusion

pytestmark = pytest.mark.usefixtures("reused_starts")


def _engine(
    pipeline: DiffusionPipeline, call_kwargs: dict[str, Any], config: EngineConfig | None = None
) -> Engine:
    model = ModelConfig(id="m", device="cpu", default_size_px=(32, 32), call_kwargs=call_kwargs)
    return Engine(LoadedPipeline(pipeline, model), model, config)


@pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", CERTIFIED)
def test_other_families_are_certified(name: str) -> None:
    build, call_kwargs, tasks = CERTIFIED[name]
    with _engine(build(), call_kwargs) as engine:
        assert engine.info.sharing == "batched", engine.info.sharing_note
        assert set(engine.info.tasks) == tasks
        result = engine.generate(GenerationParams("a red circle", 1, num_inference_steps=2))
    # Of a video, only the first frame is returned.
    assert result.pixels.ndim == 3


VIDEOS = ["wan", "anyflow", "easyanimate"]
"""Families whose decoders keep frames from one call to the next."""


def _video(name: str) -> tuple[LoadedPipeline, ModelConfig, list[GenerationParams]]:
    build, call_kwargs, _ = CERTIFIED[name]
    model = ModelConfig(id="m", device="cpu", default_size_px=(16, 16), call_kwargs=call_kwargs)
    requests = [
        GenerationParams("a red circle", seed, None, 16, 16, steps, guidance)
        for seed, steps, guidance in ((1, 3, 2.0), (2, 5, 3.5), (3, 4, 5.0))
    ]
    return LoadedPipeline(build(), model), model, requests


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_that_decode_side_by_side_equal_separate_ones(name: str) -> None:
    pipeline, model, requests = _video(name)
    separate = [pipeline.generate(params)[0] for params in requests]
    with Engine(pipeline, model, FIFO) as engine:
        assert engine.info.sharing == "batched", engine.info.sharing_note
        ends = [list(stream)[-1] for stream in [engine.stream(params) for params in requests]]
    together = [end.result.pixels for end in ends if isinstance(end, Completed)]
    assert largest_difference(separate, together) <= 1e-5


@pytest.mark.parametrize("name", VIDEOS)
def test_a_video_that_is_cancelled_while_it_decodes_leaves_nothing_behind(name: str) -> None:
    pipeline, model, (first, second, _) = _video(name)
    separate = pipeline.generate(second)[0]
    with Engine(pipeline, model, FIFO) as engine:
        ended: queue.SimpleQueue[Event] = queue.SimpleQueue()

        def on_event(event: Event) -> None:
            if isinstance(event, Progress) and event.step == event.total_steps:
                engine.cancel(number)
            elif not isinstance(event, Progress):
                ended.put(event)

        number = engine.submit(first, on_event)
        assert isinstance(ended.get(timeout=120), Queued)
        assert isinstance(ended.get(timeout=120), Failed)
        assert largest_difference([separate], [engine.generate(second).pixels]) <= 1e-5


def test_a_pipeline_that_writes_into_its_arguments_leaves_those_of_others() -> None:
    """The prompts have different lengths, so the mask of one does not fit the other."""
    model = ModelConfig(
        id="m",
        device="cpu",
        default_size_px=(32, 32),
        call_kwargs={"max_sequence_length": 64, "joint_attention_kwargs": {}},
    )
    pipeline = LoadedPipeline(bria_fibo(), model)
    requests = [
        GenerationParams(prompt, seed, None, 32, 32, 3, guidance)
        for prompt, seed, guidance in (("a red circle", 1, 5.0), ("blue", 2, 4.0), ("a", 3, 1.0))
    ]
    separate = [pipeline.generate(params)[0] for params in requests]
    with Engine(pipeline, model, FIFO) as engine:
        ends = [list(stream)[-1] for stream in [engine.stream(params) for params in requests]]
    together = [end.result.pixels for end in ends if isinstance(end, Completed)]
    assert largest_difference(separate, together) <= 1e-5
    assert model.call_kwargs["joint_attention_kwargs"] == {}


def test_a_seed_gives_the_same_image_if_a_network_draws_noise_itself() -> None:
    model = ModelConfig(
        id="m",
        device="cpu",
        default_size_px=(32, 32),
        call_kwargs=FEW_TOKENS | {"num_frames": 9, "decode_timestep": 0.05},
    )
    pipeline = LoadedPipeline(ltx(), model)
    requests = [GenerationParams("a red circle", seed, None, 32, 32, 3) for seed in (1, 2, 1)]
    with Engine(pipeline, model, FIFO) as engine:
        assert engine.info.sharing == "sequential"
        assert "requests that take turns differ" in engine.info.sharing_note
        first = [engine.generate(params).pixels for params in requests]
        ends = [list(stream)[-1] for stream in [engine.stream(params) for params in requests]]
    again = [end.result.pixels for end in ends if isinstance(end, Completed)]
    assert largest_difference(first, again) == 0
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])


def test_kontext_rejects_a_strength() -> None:
    """The steps would be counted by it, and the image would be the same."""
    image = Image.new("RGB", (32, 32), "red")
    with _engine(kontext(), CERTIFIED["flux-kontext"][1]) as engine:
        params = GenerationParams("a", 1, num_inference_steps=1, image=image)
        assert engine.generate(params).pixels.shape == (3, 32, 32)
        with pytest.raises(InvalidRequest, match="does not support strength"):
            engine.generate(replace(params, strength=1.0))


def test_kontext_ignores_the_size_of_the_request() -> None:
    """Its images have ``max_area`` pixels, by default a megapixel, in the requested shape."""
    with _engine(kontext(), CERTIFIED["flux-kontext"][1]) as engine:
        params = GenerationParams("a", 1, width=64, height=64, num_inference_steps=1)
        assert engine.generate(params).pixels.shape == (3, 32, 32)


def _controlnet() -> DiffusionPipeline:
    parts = stable_diffusion()
    return StableDiffusionControlNetPipeline(
        **parts.components,
        controlnet=ControlNetModel.from_unet(parts.unet),
        requires_safety_checker=False,
    )


def test_a_pipeline_that_needs_a_control_image_is_rejected_at_the_start() -> None:
    """The API has no field for a control image."""
    with pytest.raises(ModelLoadError, match="cannot generate an image"):
        _engine(_controlnet(), {})


@pytest.mark.filterwarnings("ignore:The configuration file of the vae:FutureWarning")
@pytest.mark.parametrize("max_running", [1, 2])
def test_an_upscaler_is_rejected_at_the_start(max_running: int) -> None:
    """Its images would be larger than any limit of a request allows."""
    parts = stable_diffusion().components
    upscaler = StableDiffusionUpscalePipeline(
        **{name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")},
        unet=unet(CLIP_DIM, in_channels=LATENT_CHANNELS + 3, num_class_embeds=1000),
        low_res_scheduler=DDPMScheduler(),
    )
    draw_weights(upscaler)
    with pytest.raises(ModelLoadError, match="Upscalers are not served"):
        _engine(upscaler, {}, EngineConfig(max_running=max_running))


def test_a_pipeline_that_writes_prompts_anew_is_rejected() -> None:
    """ERNIE-Image samples its own prompt, so that a seed does not give the same image again."""
    with pytest.raises(ModelLoadError, match=r"writes each prompt anew.*use_pe .* to false"):
        _engine(ernie_image(), {})
    for pipeline, call_kwargs in ((ernie_image(), {"use_pe": False}), (ernie_image(False), {})):
        with _engine(pipeline, call_kwargs) as engine:
            assert engine.info.sharing == "batched"
            one, two = (
                engine.generate(GenerationParams("a cat", 1, num_inference_steps=2)).pixels
                for _ in range(2)
            )
            assert torch.equal(one, two)
