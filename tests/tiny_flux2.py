"""A tiny FLUX.2 klein with random weights."""

from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from tests.tiny_networks import LATENT_CHANNELS, draw_weights
from tools.demo_model.scenes import vocabulary

_LAYERS = 27
"""Layers of the text encoder: the pipeline reads the outputs of the layers 9, 18 and 27."""


def flux2_klein() -> Flux2KleinPipeline:
    """Build the distilled variant: one call of the transformer for each step."""
    dim = 8
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        [vocabulary()], vocab_size=500, show_progress=False
    )
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    blocks = 2
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKLFlux2(
            block_out_channels=(8,) * blocks,
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=2,
        ),
        text_encoder=Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=dim,
                intermediate_size=dim,
                num_hidden_layers=_LAYERS,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=dim // 2,
                tie_word_embeddings=True,
            )
        ),
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * dim,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        is_distilled=True,
    )
    draw_weights(pipeline)
    return pipeline
