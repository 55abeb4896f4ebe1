"""Sizes that a model offers are sizes that it generates."""

import pytest
import torch

from serve_app.config.models import ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.errors import InvalidRequest
from serve_app.protocol.params import GenerationParams
from tests.tiny_pipelines import CALL_KWARGS, FAMILIES

pytestmark = pytest.mark.slow


def _engine(family: str) -> Engine:
    model = ModelConfig(
        id=family,
        device="cpu",
        default_size_px=(64, 32),
        default_steps=2,
        call_kwargs=CALL_KWARGS.get(family, {}),
    )
    return Engine(LoadedPipeline(FAMILIES[family](), model), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_smallest_and_the_most_uneven_sizes_are_generated(family: str) -> None:
    with _engine(family) as engine:
        step = engine.info.size_multiple
        longest = min(engine.info.limits.max_side_px, 512) // step * step
        for width, height in ((step, step), (3 * step, step), (step, longest), (longest, step)):
            params = GenerationParams("a red circle", 1, width=width, height=height)
            pixels = torch.as_tensor(engine.generate(params).pixels)
            assert pixels.shape[1:] == (height, width)
            assert torch.isfinite(pixels).all()


def test_a_pipeline_that_requires_a_multiple_of_32_says_so() -> None:
    with _engine("sana") as engine:
        assert engine.info.size_multiple == 32
        with pytest.raises(InvalidRequest, match="positive multiples of 32"):
            engine.submit(GenerationParams("a", 1, width=40, height=32), lambda _: None)


def test_sides_beyond_the_positions_of_the_denoiser_are_rejected() -> None:
    """Stable Diffusion 3 has a table of 16 x 16 patches here, each of 2 x 2 cells of 2 pixels."""
    with _engine("sd3") as engine:
        assert engine.info.limits.max_side_px == 64
        with pytest.raises(InvalidRequest, match="a side of 72 pixels; at most 64 are allowed"):
            engine.submit(GenerationParams("a", 1, width=72, height=32), lambda _: None)
