"""Pipelines beyond the tested families: what is certified, and what is rejected at the start.

docs/models.md describes these cases.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    ControlNetModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxKontextPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    WanPipeline,
    WanTransformer3DModel,
)

from serve_app.config.models import ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.errors import ModelLoadError
from serve_app.protocol.params import GenerationParams
from tests.tiny_ernie import ernie_image
from tests.tiny_networks import CLIP_DIM, LATENT_CHANNELS, T5_DIM, draw_weights, t5, unet
from tests.tiny_pipelines import flux, stable_diffusion

FEW_TOKENS = {"max_sequence_length": 16}


def _engine(pipeline: DiffusionPipeline, call_kwargs: dict[str, Any]) -> Engine:
    model = ModelConfig(id="m", device="cpu", default_size_px=(32, 32), call_kwargs=call_kwargs)
    return Engine(LoadedPipeline(pipeline, model), model)


def lcm() -> DiffusionPipeline:
    """Build a latent consistency model: the guidance is an input of the denoiser."""
    parts = stable_diffusion().components
    parts |= {
        "unet": unet(CLIP_DIM, time_cond_proj_dim=8),
        "scheduler": LCMScheduler(beta_schedule="scaled_linear"),
    }
    pipeline = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    draw_weights(pipeline)
    return pipeline


def chroma() -> DiffusionPipeline:
    """Build Chroma: Flux without CLIP."""
    tokenizer, text_encoder = t5()
    parts = flux()
    pipeline = ChromaPipeline(
        scheduler=parts.scheduler,
        vae=parts.vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=ChromaTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5_DIM,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
    )
    draw_weights(pipeline)
    return pipeline


def kontext() -> DiffusionPipeline:
    """Build FLUX.1 Kontext, which edits an image that is a second input of its transformer."""
    return FluxKontextPipeline(**flux().components)


def wan() -> DiffusionPipeline:
    """Build Wan, a family for videos."""
    tokenizer, text_encoder = t5()
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=AutoencoderKLWan(
            base_dim=8,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * LATENT_CHANNELS,
            latents_std=[1.0] * LATENT_CHANNELS,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            text_dim=T5_DIM,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
            cross_attn_norm=True,
            rope_max_seq_len=64,
        ),
    )
    draw_weights(pipeline)
    return pipeline


CERTIFIED: dict[str, tuple[Callable[[], DiffusionPipeline], dict[str, Any], set[str]]] = {
    "lcm": (lcm, {}, {"text-to-image", "image-to-image"}),
    "chroma": (chroma, FEW_TOKENS, {"text-to-image"}),
    "flux-kontext": (
        kontext,
        # Kontext rescales every image to ``max_area``, here to the default size.
        FEW_TOKENS | {"max_area": 32 * 32, "_auto_resize": False},
        {"text-to-image", "image-to-image"},
    ),
    "wan": (wan, FEW_TOKENS | {"num_frames": 5}, {"text-to-image"}),
}
"""The builder, the call arguments and the tasks of pipelines that are certified as batched."""


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


def _inpainting() -> DiffusionPipeline:
    return StableDiffusionInpaintPipeline(
        **stable_diffusion().components, requires_safety_checker=False
    )


def _fill() -> DiffusionPipeline:
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    parts = flux().components
    return FluxFillPipeline(**{name: parts[name] for name in (*names, "transformer")})


@pytest.mark.parametrize(
    ("build", "call_kwargs"), [(_controlnet, {}), (_inpainting, {}), (_fill, FEW_TOKENS)]
)
def test_a_pipeline_that_needs_an_image_is_rejected_at_the_start(
    build: Callable[[], DiffusionPipeline], call_kwargs: dict[str, Any]
) -> None:
    """Every model must generate an image from a prompt alone."""
    with pytest.raises(ModelLoadError, match="cannot generate an image"):
        _engine(build(), call_kwargs)


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
