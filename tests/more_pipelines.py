"""Stock pipelines beyond `tests.tiny_pipelines.FAMILIES`, built in memory in the same way."""

from collections.abc import Callable
from typing import Any

from diffusers import (
    AnyFlowPipeline,
    AnyFlowTransformer3DModel,
    AutoencoderKLLTXVideo,
    AutoencoderKLMagvit,
    AutoencoderKLWan,
    BriaFiboPipeline,
    BriaFiboTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    ModelMixin,
    SchedulerMixin,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    Qwen2Config,
    Qwen2Model,
    Qwen2Tokenizer,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from tests.tiny_networks import (
    CLIP_DIM,
    LATENT_CHANNELS,
    T5_DIM,
    autoencoder,
    draw_weights,
    t5,
    unet,
)
from tests.tiny_pipelines import flux, stable_diffusion
from tools.demo_model.scenes import vocabulary

FEW_TOKENS = {"max_sequence_length": 16}


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


VIDEO_TRANSFORMER: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "text_dim": T5_DIM,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 1,
    "cross_attn_norm": True,
    "rope_max_seq_len": 64,
}


def _video_vae() -> AutoencoderKLWan:
    """Build a VAE that decodes one frame after another, and keeps the last ones in a cache."""
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def _video(
    kind: type[DiffusionPipeline], scheduler: SchedulerMixin, transformer: ModelMixin
) -> DiffusionPipeline:
    tokenizer, text_encoder = t5()
    pipeline = kind(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=_video_vae(),
        scheduler=scheduler,
        transformer=transformer,
    )
    draw_weights(pipeline)
    return pipeline


def wan() -> DiffusionPipeline:
    """Build Wan, a family for videos."""
    transformer = WanTransformer3DModel(**VIDEO_TRANSFORMER)
    return _video(WanPipeline, FlowMatchEulerDiscreteScheduler(shift=3.0), transformer)


def anyflow() -> DiffusionPipeline:
    """Build AnyFlow: Wan's parts, with the next timestep as a second input of the transformer."""
    transformer = AnyFlowTransformer3DModel(**VIDEO_TRANSFORMER)
    return _video(AnyFlowPipeline, FlowMapEulerDiscreteScheduler(), transformer)


def ltx() -> DiffusionPipeline:
    """Build LTX-Video, whose decoder adds noise that it draws from torch's own generator."""
    tokenizer, text_encoder = t5()
    pipeline = LTXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            down_block_types=("LTXVideoDownBlock3D",) * 2,
            downsample_type=("conv",) * 2,
            layers_per_block=(1,) * 3,
            decoder_layers_per_block=(1,) * 3,
            spatio_temporal_scaling=(True, False),
            decoder_spatio_temporal_scaling=(True, False),
            upsample_residual=(False,) * 2,
            upsample_factor=(1,) * 2,
            decoder_inject_noise=(True,) * 3,
            timestep_conditioning=True,
            patch_size=1,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=1,
            caption_channels=T5_DIM,
        ),
    )
    draw_weights(pipeline)
    return pipeline


def words() -> Qwen2Tokenizer:
    """Build a tokenizer of the demo model's words."""
    return Qwen2Tokenizer().train_new_from_iterator(
        [vocabulary()], vocab_size=500, show_progress=False
    )


def bria_fibo() -> DiffusionPipeline:
    """Build Bria FIBO, which writes its attention mask into the dict that the caller passes.

    A call without guidance has no mask.
    """
    dim = 16
    pipeline = BriaFiboPipeline(
        tokenizer=words(),
        text_encoder=SmolLM3ForCausalLM(
            SmolLM3Config(
                vocab_size=128_001,  # the pipeline has the last token for an empty prompt
                hidden_size=dim,
                intermediate_size=dim,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                pad_token_id=0,
                bos_token_id=0,
                eos_token_id=0,
            )
        ),
        vae=_video_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=BriaFiboTransformer2DModel(
            in_channels=LATENT_CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=2 * dim,
            text_encoder_dim=dim,
            axes_dims_rope=[0, 4, 4],
        ),
    )
    draw_weights(pipeline)
    return pipeline


def easyanimate() -> DiffusionPipeline:
    """Build EasyAnimate, whose VAE keeps the last frames in each of its layers."""
    tokenizer = words()
    tokenizer.chat_template = "{{ messages[0]['content'][0]['text'] }}"
    dim = 32
    pipeline = EasyAnimatePipeline(
        tokenizer=tokenizer,
        text_encoder=Qwen2Model(
            Qwen2Config(
                vocab_size=len(tokenizer),
                hidden_size=dim,
                intermediate_size=dim,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
            )
        ),
        vae=AutoencoderKLMagvit(
            latent_channels=LATENT_CHANNELS,
            block_out_channels=(8, 8, 8),
            down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 2),
            up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 2),
            layers_per_block=1,
            norm_num_groups=2,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=EasyAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            patch_size=2,
            num_layers=2,
            mmdit_layers=1,
            time_embed_dim=8,
            text_embed_dim=dim,
        ),
    )
    draw_weights(pipeline)
    return pipeline


def z_image() -> DiffusionPipeline:
    """Build Z-Image, whose transformer takes lists: of latents, and of texts as long as they are.

    It pads each text to a multiple of 32 tokens, and then all texts to the longest.
    """
    tokenizer = words()
    tokenizer.chat_template = "a {{ messages[0]['content'] }}"  # no prompt is empty
    dim = 16
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=Qwen2Model(
            Qwen2Config(
                vocab_size=len(tokenizer),
                hidden_size=dim,
                intermediate_size=dim,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
            )
        ),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            in_channels=LATENT_CHANNELS,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=dim,
            axes_dims=[4, 6, 6],
            axes_lens=[256, 64, 64],
        ),
    )
    draw_weights(pipeline)
    return pipeline


def flux_schnell() -> DiffusionPipeline:
    """Build a pipeline like FLUX.1 schnell: two calls of the transformer a step with guidance.

    Requests with and without guidance differ in their calls of encoders, and few blocks of a VAE
    hide that. Whether they share a batch must not depend on it.
    """
    return flux(guidance_embeds=False, vae_blocks=1)


CERTIFIED: dict[str, tuple[Callable[[], DiffusionPipeline], dict[str, Any], set[str]]] = {
    "lcm": (lcm, {}, {"text-to-image", "image-to-image"}),
    "chroma": (chroma, FEW_TOKENS, {"text-to-image"}),
    "flux-kontext": (
        kontext,
        # Kontext rescales every image to ``max_area``, here to the default size.
        FEW_TOKENS | {"max_area": 32 * 32, "_auto_resize": False},
        {"text-to-image", "image-to-image"},
    ),
    "flux-schnell": (
        flux_schnell,
        FEW_TOKENS,
        {"text-to-image", "image-to-image", "inpainting"},
    ),
    "wan": (wan, FEW_TOKENS | {"num_frames": 9}, {"text-to-image"}),
    "bria-fibo": (
        bria_fibo,
        {"max_sequence_length": 64, "joint_attention_kwargs": {}},
        {"text-to-image"},
    ),
    "easyanimate": (easyanimate, {"num_frames": 9, "negative_prompt": ""}, {"text-to-image"}),
    "z-image": (
        z_image,
        {"max_sequence_length": 128},
        {"text-to-image", "image-to-image", "inpainting"},
    ),
    "anyflow": (anyflow, FEW_TOKENS | {"num_frames": 9}, {"text-to-image"}),
}
"""The builder, the call arguments and the tasks of pipelines that are certified as batched."""
