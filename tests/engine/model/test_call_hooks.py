"""The hooks into a request's copy of the pipeline."""

import copy
import inspect
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from serve_app.config.models import ModelConfig
from serve_app.engine.model.call_hooks import keep_timesteps_on_cpu
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.protocol.params import GenerationParams
from tests.tiny_pipelines import CALL_KWARGS, FAMILIES, HEIGHT_PX, WIDTH_PX


@pytest.mark.parametrize("family", FAMILIES)
def test_no_call_searches_all_networks_for_its_device(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(id=family, device="cpu", call_kwargs=CALL_KWARGS.get(family, {}))
    pipeline = LoadedPipeline(FAMILIES[family](), config)
    searches: list[DiffusionPipeline] = []

    def search(searched: DiffusionPipeline) -> torch.device:
        searches.append(searched)
        return torch.device("cpu")

    monkeypatch.setattr(DiffusionPipeline, "_execution_device", property(search))
    params = GenerationParams("a", 1, width=WIDTH_PX, height=HEIGHT_PX, num_inference_steps=2)
    of_copy = pipeline.generate(params)
    assert not searches
    monkeypatch.setattr(pipeline, "_classes", {"text-to-image": type(pipeline.stock)})
    assert torch.equal(pipeline.generate(params), of_copy)
    assert searches, "diffusers finds the device in another way, so known_device has no use"


def test_a_copy_is_a_pipeline_of_its_task() -> None:
    pipeline = LoadedPipeline(FAMILIES["stable-diffusion"](), ModelConfig(id="a", device="cpu"))
    image, mask = Image.new("RGB", (WIDTH_PX, HEIGHT_PX)), Image.new("L", (WIDTH_PX, HEIGHT_PX))
    seen = set()
    plain = GenerationParams("a", 1, width=WIDTH_PX, height=HEIGHT_PX)
    edit = replace(plain, image=image)
    for params in (plain, edit, replace(edit, mask_image=mask)):
        copied = pipeline._copy_for_call(params)
        stock = pipeline.pipelines[params.task]
        assert isinstance(copied, type(stock))
        assert type(copied).__name__ == type(stock).__name__
        assert copied._execution_device == stock._execution_device == torch.device("cpu")
        seen.add(type(copied))
    assert len(seen) == 3


def test_copies_of_a_noise_scheduler_keep_their_own_timesteps_on_the_cpu() -> None:
    """Some pipelines copy their noise scheduler, one for pictures and one for sounds."""
    pipeline = FAMILIES["sd3"]()
    noise_scheduler = copy.deepcopy(pipeline.scheduler)
    keep_timesteps_on_cpu(noise_scheduler)
    copied = copy.deepcopy(noise_scheduler)
    copied.set_timesteps(3, device="meta")
    noise_scheduler.set_timesteps(sigmas=[1.0, 0.5], device=torch.device("meta"))
    assert (copied.timesteps.device.type, len(copied.timesteps)) == ("cpu", 3)
    assert (noise_scheduler.timesteps.device.type, len(noise_scheduler.timesteps)) == ("cpu", 2)
    assert isinstance(noise_scheduler, type(pipeline.scheduler))
    names = inspect.signature(noise_scheduler.set_timesteps).parameters.keys()
    assert {"sigmas", "device"} <= names  # pipelines look for them
