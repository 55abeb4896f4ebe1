"""Networks in their published configurations that `tests.full_size` does not build.

Only their weights are counted, on the device "meta". Configurations without arguments are the
defaults of the class, which are those of the published network.
"""

from diffusers import (
    AutoencoderDC,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
)


def clip_l_with_projection() -> CLIPTextModelWithProjection:
    """Build the first text encoder of Stable Diffusion 3.5."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            projection_dim=768,
            num_hidden_layers=12,
            num_attention_heads=12,
        )
    )


def sd35_medium_transformer() -> SD3Transformer2DModel:
    heads = 24
    return SD3Transformer2DModel(
        num_layers=24,
        num_attention_heads=heads,
        caption_projection_dim=64 * heads,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )


def sd35_large_transformer() -> SD3Transformer2DModel:
    heads = 38
    return SD3Transformer2DModel(
        num_layers=38,
        num_attention_heads=heads,
        caption_projection_dim=64 * heads,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    )


def flux_schnell_transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(guidance_embeds=False)


def flux2_klein_transformer() -> Flux2Transformer2DModel:
    """Build the transformer of FLUX.2 klein with four billion weights."""
    return Flux2Transformer2DModel(
        num_layers=5,
        num_single_layers=20,
        num_attention_heads=24,
        joint_attention_dim=7680,
        guidance_embeds=False,
    )


def pixart_sigma_transformer() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(caption_channels=4096, use_additional_conditions=False)


def dc_ae() -> AutoencoderDC:
    """Build the VAE of Sana: a latent cell has 32 pixels a side."""
    kinds = (*("ResBlock",) * 3, *("EfficientViTBlock",) * 3)
    return AutoencoderDC(
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )


def qwen3_4b() -> Qwen3Model:
    """Build the text encoder of Z-Image and of FLUX.2 klein. The latter's head has no weights."""
    return Qwen3Model(
        Qwen3Config(
            vocab_size=151_936,
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
        )
    )


def qwen25_vl_7b() -> Qwen2_5_VLForConditionalGeneration:
    """Build the text encoder of Qwen-Image."""
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": 152_064,
                "hidden_size": 3584,
                "intermediate_size": 18_944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
            },
            vision_config={
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": 3584,
            },
        )
    )
