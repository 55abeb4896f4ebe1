"""Stock pipelines of the major families, built in memory: tiny networks, random weights.

They work offline, in float32 on the CPU, for 64x32 pixels. Every weight is drawn from one seed, so
a family is the same pipeline in every process. The images are noise that depends on the prompt, the
seed, the steps and the guidance.
"""

from collections.abc import Callable

from diffusers import (
    AnimateDiffPipeline,
    AutoencoderDC,
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
)
from pydantic import JsonValue
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

from tests.tiny_networks import (
    CLIP_DIM,
    HEIGHT_PX,
    LATENT_CHANNELS,
    LETTERS,
    T5_DIM,
    WIDTH_PX,
    autoencoder,
    clip,
    draw_weights,
    t5,
    unet,
)
from tools.demo_model.scenes import vocabulary

__all__ = ["CALL_KWARGS", "FAMILIES", "HEIGHT_PX", "WIDTH_PX"]


def stable_diffusion() -> StableDiffusionPipeline:
    tokenizer, text_encoder = clip(CLIPTextModel)
    pipeline = StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet(CLIP_DIM),
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
    draw_weights(pipeline)
    return pipeline


def pag() -> StableDiffusionPAGPipeline:
    """Build Stable Diffusion with perturbed-attention guidance: its batch has three parts."""
    pipeline = StableDiffusionPAGPipeline(
        **stable_diffusion().components, requires_safety_checker=False, pag_applied_layers="mid"
    )
    draw_weights(pipeline)
    return pipeline


def animatediff() -> AnimateDiffPipeline:
    """Build Stable Diffusion with motion between frames, which it folds into the batch."""
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
    draw_weights(pipeline)
    return pipeline


def sdxl(in_channels: int = LATENT_CHANNELS) -> StableDiffusionXLPipeline:
    tokenizer, text_encoder = clip(CLIPTextModel)
    tokenizer_2, text_encoder_2 = clip(CLIPTextModelWithProjection)
    size_embedding_dim = 8
    pipeline = StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet(
            2 * CLIP_DIM,
            in_channels=in_channels,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=size_embedding_dim,
            projection_class_embeddings_input_dim=6 * size_embedding_dim + CLIP_DIM,
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
    draw_weights(pipeline)
    return pipeline


def sd3() -> StableDiffusion3Pipeline:
    tokenizer, text_encoder = clip(CLIPTextModelWithProjection)
    tokenizer_2, text_encoder_2 = clip(CLIPTextModelWithProjection)
    tokenizer_3, text_encoder_3 = t5()
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
            joint_attention_dim=T5_DIM,
            pooled_projection_dim=2 * CLIP_DIM,
            pos_embed_max_size=WIDTH_PX // 4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(
            channels, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06
        ),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )
    draw_weights(pipeline)
    return pipeline


def flux(
    guidance_embeds: bool = True, vae_blocks: int = 2, in_channels: int = 4 * LATENT_CHANNELS
) -> FluxPipeline:
    """Build a pipeline like FLUX.1 dev, whose guidance is an input of the transformer."""
    tokenizer, text_encoder = clip(CLIPTextModel)
    tokenizer_2, text_encoder_2 = t5()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(
            blocks=vae_blocks,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.06,
        ),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=FluxTransformer2DModel(
            in_channels=in_channels,
            out_channels=4 * LATENT_CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5_DIM,
            pooled_projection_dim=CLIP_DIM,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 4, 8),
        ),
    )
    draw_weights(pipeline)
    return pipeline


def pixart_sigma(vae_blocks: int = 2) -> PixArtSigmaPipeline:
    tokenizer, text_encoder = t5()
    pipeline = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=autoencoder(blocks=vae_blocks),
        transformer=PixArtTransformer2DModel(
            sample_size=WIDTH_PX // 2,
            in_channels=LATENT_CHANNELS,
            out_channels=2 * LATENT_CHANNELS,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            cross_attention_dim=16,
            caption_channels=T5_DIM,
        ),
        scheduler=DPMSolverMultistepScheduler(),
    )
    draw_weights(pipeline)
    return pipeline


def qwen_image() -> QwenImagePipeline:
    dim = 32
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * LATENT_CHANNELS,
            latents_std=[1.0] * LATENT_CHANNELS,
        ),
        text_encoder=None,
        tokenizer=None,
        transformer=QwenImageTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
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
    draw_weights(pipeline)
    return pipeline


def sana(vae_blocks: int = 2) -> SanaPipeline:
    dim = 16
    plain = vae_blocks - 1
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *LETTERS]
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
            latent_channels=LATENT_CHANNELS,
            attention_head_dim=4,
            encoder_block_types=(*("ResBlock",) * plain, "EfficientViTBlock"),
            decoder_block_types=(*("ResBlock",) * plain, "EfficientViTBlock"),
            encoder_block_out_channels=(8,) * vae_blocks,
            decoder_block_out_channels=(8,) * vae_blocks,
            encoder_layers_per_block=(1,) * vae_blocks,
            decoder_layers_per_block=(1,) * vae_blocks,
            encoder_qkv_multiscales=(*((),) * plain, (5,)),
            decoder_qkv_multiscales=(*((),) * plain, (5,)),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
        ),
        transformer=SanaTransformer2DModel(
            sample_size=WIDTH_PX // 2,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
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
    draw_weights(pipeline)
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
"""Builders by family. Every call builds a new pipeline with the same weights."""

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
"""Call arguments by family, where needed.

Few tokens keep the tests fast, and resolution binning needs real sizes."""
