"""Stock pipelines of the families that matter, made in memory: tiny networks, random weights.

Offline and in float32 on the CPU. Every weight is drawn from one seed, so a family is the same
pipeline in every process. Made for 64x32 pixels; what they paint is noise, but noise that depends
on the prompt, the seed, the steps and the guidance.
"""

from collections.abc import Callable
from string import ascii_lowercase

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    MotionAdapter,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from pydantic import JsonValue
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from serve_app.demo.tokenizer import build_tokenizer
from tools.demo_model.scenes import vocabulary

WIDTH_PX, HEIGHT_PX = 64, 32
"""The size that the networks are made for; not square, so that a swapped pair shows."""

_LATENT_CHANNELS = 4
_CLIP_DIM = 32
_T5_DIM = 2 * _CLIP_DIM
"""SD3 pads the two CLIP encodings, side by side, to the width of the T5 encoding."""

_LETTERS = ["▁", *ascii_lowercase]
"""The alphabet of SentencePiece tokenizers; the first stands for a space."""


def _draw_weights(pipeline: DiffusionPipeline) -> None:
    """Draw every weight anew, so that no layer is left at zero and each passes its input on.

    Scales of norms start as ones and stay. The others get the spread that keeps the variance
    from input to output; the usual small spread would drown the prompt in the biases.
    """
    generator = torch.Generator().manual_seed(0)
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    with torch.no_grad():
        for network in networks:
            for weights in network.parameters():
                if not bool((weights == 1).all()):
                    spread = weights[0].numel() ** -0.5 if weights.ndim > 1 else 0.1
                    weights.normal_(0.0, spread, generator=generator)


def _autoencoder(channels: int = _LATENT_CHANNELS, **config: object) -> AutoencoderKL:
    """Two pixels a side to one latent cell."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        **config,
    )


def _unet(cross_attention_dim: int, **config: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=WIDTH_PX // 2,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=2,
        cross_attention_dim=cross_attention_dim,
        **config,
    )


def _clip(
    kind: type[CLIPTextModel] | type[CLIPTextModelWithProjection],
) -> tuple[CLIPTokenizer, CLIPTextModel | CLIPTextModelWithProjection]:
    tokenizer = build_tokenizer(vocabulary())
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        hidden_size=_CLIP_DIM,
        intermediate_size=_CLIP_DIM,
        projection_dim=_CLIP_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, kind(config)


def _t5() -> tuple[T5Tokenizer, T5EncoderModel]:
    """Its tokenizer takes a word of the demo model's language as one token, others by letter."""
    scores = dict.fromkeys(["<pad>", "</s>", "<unk>"], 0.0) | dict.fromkeys(_LETTERS, -10.0)
    scores |= dict.fromkeys((f"▁{word}" for word in vocabulary()), -5.0)
    tokenizer = T5Tokenizer(list(scores.items()), extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=_T5_DIM,
        d_kv=16,
        d_ff=_T5_DIM,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer, T5EncoderModel(config)


def stable_diffusion() -> StableDiffusionPipeline:
    tokenizer, text_encoder = _clip(CLIPTextModel)
    pipeline = StableDiffusionPipeline(
        vae=_autoencoder(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=_unet(_CLIP_DIM),
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    _draw_weights(pipeline)
    return pipeline


def pag() -> StableDiffusionPAGPipeline:
    """Stable Diffusion with perturbed-attention guidance: its batch is in three parts."""
    pipeline = StableDiffusionPAGPipeline(
        **stable_diffusion().components, requires_safety_checker=False, pag_applied_layers="mid"
    )
    _draw_weights(pipeline)
    return pipeline


def animatediff() -> AnimateDiffPipeline:
    """Stable Diffusion with motion between the frames, which it folds into the batch."""
    parts = stable_diffusion().components
    channels: tuple[int, ...] = parts["unet"].config.block_out_channels
    pipeline = AnimateDiffPipeline(
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        tokenizer=parts["tokenizer"],
        unet=parts["unet"],
        motion_adapter=MotionAdapter(
            block_out_channels=channels,
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=2,
        ),
        scheduler=parts["scheduler"],
    )
    _draw_weights(pipeline)
    return pipeline


def sdxl() -> StableDiffusionXLPipeline:
    tokenizer, text_encoder = _clip(CLIPTextModel)
    tokenizer_2, text_encoder_2 = _clip(CLIPTextModelWithProjection)
    size_embedding_dim = 8
    pipeline = StableDiffusionXLPipeline(
        vae=_autoencoder(),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=_unet(
            2 * _CLIP_DIM,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=size_embedding_dim,
            projection_class_embeddings_input_dim=6 * size_embedding_dim + _CLIP_DIM,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )
    _draw_weights(pipeline)
    return pipeline


def sd3() -> StableDiffusion3Pipeline:
    tokenizer, text_encoder = _clip(CLIPTextModelWithProjection)
    tokenizer_2, text_encoder_2 = _clip(CLIPTextModelWithProjection)
    tokenizer_3, text_encoder_3 = _t5()
    channels = 16  # its inpainting takes no other number
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=WIDTH_PX // 2,
            in_channels=channels,
            out_channels=channels,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=_T5_DIM,
            pooled_projection_dim=2 * _CLIP_DIM,
            pos_embed_max_size=WIDTH_PX // 4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(
            channels, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06
        ),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )
    _draw_weights(pipeline)
    return pipeline


def flux() -> FluxPipeline:
    """Like FLUX.1 dev: its guidance is distilled into an input of the transformer."""
    tokenizer, text_encoder = _clip(CLIPTextModel)
    tokenizer_2, text_encoder_2 = _t5()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=FluxTransformer2DModel(
            in_channels=4 * _LATENT_CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=_T5_DIM,
            pooled_projection_dim=_CLIP_DIM,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
    )
    _draw_weights(pipeline)
    return pipeline


def pixart_sigma() -> PixArtSigmaPipeline:
    tokenizer, text_encoder = _t5()
    pipeline = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=_autoencoder(),
        transformer=PixArtTransformer2DModel(
            sample_size=WIDTH_PX // 2,
            in_channels=_LATENT_CHANNELS,
            out_channels=2 * _LATENT_CHANNELS,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            cross_attention_dim=16,
            caption_channels=_T5_DIM,
        ),
        scheduler=DPMSolverMultistepScheduler(),
    )
    _draw_weights(pipeline)
    return pipeline


def qwen_image() -> QwenImagePipeline:
    dim = 32
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=_LATENT_CHANNELS,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * _LATENT_CHANNELS,
            latents_std=[1.0] * _LATENT_CHANNELS,
        ),
        text_encoder=None,
        tokenizer=None,
        transformer=QwenImageTransformer2DModel(
            in_channels=4 * _LATENT_CHANNELS,
            out_channels=_LATENT_CHANNELS,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=dim,
            axes_dims_rope=(8, 4, 4),
        ),
    )
    # The pipeline drops as many tokens as the real tokenizer takes for its template, so each word
    # of the template must be a single token here too.
    words = [*vocabulary(), *(f" {word}" for word in vocabulary())]
    tokenizer = Qwen2Tokenizer(
        additional_special_tokens=["<|im_start|>", "<|im_end|>"]
    ).train_new_from_iterator(
        [[pipeline.prompt_template_encode, *words]], vocab_size=2000, show_progress=False
    )
    pipeline.register_modules(
        tokenizer=tokenizer,
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={
                    "vocab_size": len(tokenizer),
                    "hidden_size": dim,
                    "intermediate_size": dim,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
                },
                vision_config={
                    "depth": 1,
                    "hidden_size": dim,
                    "intermediate_size": dim,
                    "num_heads": 2,
                    "out_hidden_size": dim,
                },
            )
        ),
    )
    _draw_weights(pipeline)
    return pipeline


def sana() -> SanaPipeline:
    dim = 16
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *_LETTERS]
    tokenizer = GemmaTokenizer({piece: index for index, piece in enumerate(pieces)})
    pipeline = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(
            Gemma2Config(
                vocab_size=len(tokenizer),
                hidden_size=dim,
                intermediate_size=dim,
                head_dim=dim // 2,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        ),
        vae=AutoencoderDC(
            latent_channels=_LATENT_CHANNELS,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
        ),
        transformer=SanaTransformer2DModel(
            sample_size=WIDTH_PX // 2,
            in_channels=_LATENT_CHANNELS,
            out_channels=_LATENT_CHANNELS,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=dim,
        ),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
    _draw_weights(pipeline)
    return pipeline


FAMILIES: dict[str, Callable[[], DiffusionPipeline]] = {
    "stable-diffusion": stable_diffusion,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "pixart-sigma": pixart_sigma,
    "qwen-image": qwen_image,
    "sana": sana,
}
"""How to build a pipeline of each family. Every call builds a new one, with the same weights."""

CALL_KWARGS: dict[str, dict[str, JsonValue]] = {
    "sd3": {"max_sequence_length": 16},
    "flux": {"max_sequence_length": 16},
    "pixart-sigma": {
        "max_sequence_length": 16,
        "use_resolution_binning": False,
        "clean_caption": False,
    },
    "sana": {
        "max_sequence_length": 48,
        "use_resolution_binning": False,
        "complex_human_instruction": None,
    },
}
"""By family; the others need none. Few tokens keep the tests fast; binning wants real sizes."""
