"""Caches of diffusers inside a denoiser: their calls, and the network that they leave alone."""

import pytest
import torch

from serve_app.config.models import ModelConfig
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.model.step_caches import (
    CacheConfig,
    first_block_cache,
    taylor_seer,
    with_cache,
)
from serve_app.protocol.params import GenerationParams
from tests.tiny_pipelines import CALL_KWARGS, FAMILIES, HEIGHT_PX, WIDTH_PX

STEPS = 12
PARAMS = GenerationParams(
    "a red circle", 1, width=WIDTH_PX, height=HEIGHT_PX, num_inference_steps=STEPS
)


def load(family: str) -> LoadedPipeline:
    kwargs = CALL_KWARGS.get(family, {})
    config = ModelConfig(id=family, path="in-memory", device="cpu", call_kwargs=kwargs)
    return LoadedPipeline(FAMILIES[family](), config)


@pytest.fixture(scope="module")
def flux() -> LoadedPipeline:
    return load("flux")


@pytest.mark.parametrize(
    ("config", "calls"),
    [
        (first_block_cache(0.0), STEPS),
        (first_block_cache(100.0), 1),
        (taylor_seer(1), STEPS),
        (taylor_seer(2), 7),  # steps 0 to 2, then each second one
        (taylor_seer(5), 5),
    ],
    ids=str,
)
def test_calls_are_counted_and_the_network_stays_as_it_is(
    flux: LoadedPipeline, config: CacheConfig, calls: int
) -> None:
    before = flux.generate(PARAMS)[0]
    cached = with_cache(flux, config)
    assert cached is not None
    image, computed = cached.generate(PARAMS)
    assert computed == calls
    assert image.isfinite().all()
    assert torch.equal(image, before) == (calls == STEPS)
    again, computed_again = cached.generate(PARAMS)  # nothing is left of the image before
    assert torch.equal(again, image)
    assert computed_again == calls
    assert torch.equal(flux.generate(PARAMS)[0], before)


def test_a_copy_has_no_weights_of_its_own(flux: LoadedPipeline) -> None:
    cached = with_cache(flux, first_block_cache(100.0))
    assert cached is not None
    skipped, _ = cached.generate(PARAMS)
    weight = flux.stock.transformer.proj_out.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(2)
    changed, _ = cached.generate(PARAMS)
    with torch.no_grad():
        weight.copy_(kept)
    assert not torch.equal(changed, skipped)


@pytest.mark.parametrize("family", ["stable-diffusion", "sana"])
@pytest.mark.parametrize("config", [first_block_cache(0.1), taylor_seer(3)], ids=str)
def test_other_denoisers_support_none(family: str, config: CacheConfig) -> None:
    assert with_cache(load(family), config) is None
