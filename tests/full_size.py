"""Stock pipelines of the published sizes, with random weights: no download, the same work.

The networks have the published configurations, so a call does the arithmetic of a real one. Their
weights are drawn on the device, in the given dtype, from one seed. Tokenizers and noise schedulers
come from `tests.tiny_pipelines`, and prompts are padded to the real lengths. The images are noise
that depends on the prompt, the seed, the steps and the guidance.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests import tiny_pipelines

CLIP_TOKENS = 77
"""Number of tokens that CLIP reads, and to which prompts are padded."""


@contextmanager
def _made(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Build networks inside the block on this device and in this dtype."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(usual)


def _draw_weights(pipeline: DiffusionPipeline) -> None:
    """Draw every weight with the spread that keeps the variance from input to output.

    Norms have scales of one and no offsets, so activations stay small enough for bfloat16 through
    any number of layers.
    """
    generator = torch.Generator(pipeline.device).manual_seed(0)
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    with torch.no_grad():
        for network in networks:
            network.eval()  # like a loaded pipeline
            for name, weights in network.named_parameters():
                if weights.ndim > 1:
                    weights.normal_(0.0, weights[0].numel() ** -0.5, generator=generator)
                else:
                    weights.fill_(name.endswith("weight"))


def _clip_tokenizer(tokenizer: CLIPTokenizer) -> CLIPTokenizer:
    tokenizer.model_max_length = CLIP_TOKENS
    return tokenizer


def _clip_config(tokenizer: CLIPTokenizer, **config: object) -> CLIPTextConfig:
    """Return a config with the published vocabulary; the tokenizer uses a few hundred entries."""
    return CLIPTextConfig(
        vocab_size=49408,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **config,
    )


def clip_l(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the text encoder of openai/clip-vit-large-patch14: in SD 1.5, SDXL and FLUX.1."""
    return CLIPTextModel(
        _clip_config(
            tokenizer,
            hidden_size=768,
            intermediate_size=3072,
            projection_dim=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            hidden_act="quick_gelu",
        )
    )


def clip_big_g(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Build the text encoder of OpenCLIP ViT-bigG/14: SDXL's second."""
    return CLIPTextModelWithProjection(
        _clip_config(
            tokenizer,
            hidden_size=1280,
            intermediate_size=5120,
            projection_dim=1280,
            num_hidden_layers=32,
            num_attention_heads=20,
            hidden_act="gelu",
        )
    )


def t5_xxl(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Build the encoder of google/t5-v1_1-xxl: FLUX.1's second."""
    return T5EncoderModel(
        T5Config(
            vocab_size=32128,
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def autoencoder(**config: object) -> AutoencoderKL:
    """Build the VAE of SD 1.5, SDXL and FLUX.1: a latent cell has eight pixels a side."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        **config,
    )


def sd15_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        layers_per_block=2,
        attention_head_dim=8,
        cross_attention_dim=768,
    )


def sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
        up_block_types=(*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def flux_transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        guidance_embeds=True,
        axes_dims_rope=(16, 56, 56),
    )


def sd15(device: torch.device, dtype: torch.dtype) -> StableDiffusionPipeline:
    """Build Stable Diffusion 1.5."""
    tiny = tiny_pipelines.stable_diffusion()
    tokenizer = _clip_tokenizer(tiny.tokenizer)
    with _made(device, dtype):
        unet, vae = sd15_unet(), autoencoder(sample_size=512)
        text_encoder = clip_l(tokenizer)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=tiny.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    _draw_weights(pipeline)
    return pipeline


def sdxl(device: torch.device, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    """Build Stable Diffusion XL base 1.0."""
    tiny = tiny_pipelines.sdxl()
    tokenizers = _clip_tokenizer(tiny.tokenizer), _clip_tokenizer(tiny.tokenizer_2)
    with _made(device, dtype):
        unet, vae = sdxl_unet(), autoencoder(sample_size=1024, scaling_factor=0.13025)
        text_encoders = clip_l(tokenizers[0]), clip_big_g(tokenizers[1])
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoders[0],
        text_encoder_2=text_encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=tiny.scheduler,
        add_watermarker=False,
    )
    _draw_weights(pipeline)
    return pipeline


def flux(device: torch.device, dtype: torch.dtype) -> FluxPipeline:
    """Build FLUX.1 dev."""
    tiny = tiny_pipelines.flux()
    tokenizer = _clip_tokenizer(tiny.tokenizer)
    with _made(device, dtype):
        transformer, vae = flux_transformer(), flux_autoencoder()
        text_encoders = clip_l(tokenizer), t5_xxl(tiny.tokenizer_2)
    pipeline = FluxPipeline(
        scheduler=tiny.scheduler,
        vae=vae,
        text_encoder=text_encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=text_encoders[1],
        tokenizer_2=tiny.tokenizer_2,
        transformer=transformer,
    )
    _draw_weights(pipeline)
    return pipeline


def flux_autoencoder() -> AutoencoderKL:
    return autoencoder(
        sample_size=1024,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


MODELS: dict[str, Callable[[torch.device, torch.dtype], DiffusionPipeline]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "flux": flux,
}
"""Builders by name; each takes the device and the dtype."""
