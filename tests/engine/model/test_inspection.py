"""Sizes that a model offers are sizes that it generates."""

import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)

from serve_app.config.models import ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.errors import InvalidRequest
from serve_app.protocol.params import GenerationParams
from tests.tiny_networks import LATENT_CHANNELS, T5_DIM, autoencoder, draw_weights, t5
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


def aura_flow() -> AuraFlowPipeline:
    tokenizer, text_encoder = t5()
    pipeline = AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        transformer=AuraFlowTransformer2DModel(
            sample_size=16,
            in_channels=LATENT_CHANNELS,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=T5_DIM,
            caption_projection_dim=16,
            out_channels=LATENT_CHANNELS,
            pos_embed_max_size=256,
        ),
    )
    draw_weights(pipeline)
    return pipeline


def test_sides_beyond_a_table_that_counts_all_positions_are_rejected() -> None:
    """AuraFlow takes positions of other rows for a long side, without an error."""
    model = ModelConfig(
        id="aura",
        device="cpu",
        default_size_px=(32, 32),
        default_steps=2,
        call_kwargs={"max_sequence_length": 16},
    )
    with Engine(LoadedPipeline(aura_flow(), model), model) as engine:
        assert engine.info.limits.max_side_px == 64
        engine.generate(GenerationParams("a", 1, width=64, height=64))
        with pytest.raises(InvalidRequest, match="a side of 128 pixels; at most 64 are allowed"):
            engine.submit(GenerationParams("a", 1, width=128, height=32), lambda _: None)
