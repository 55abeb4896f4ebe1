"""ERNIE-Image, built in memory: its language model writes the prompt anew."""

from diffusers import (
    AutoencoderKLFlux2,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import GemmaTokenizer, MistralConfig, MistralForCausalLM, MistralModel

from tests.tiny_networks import LATENT_CHANNELS, LETTERS, draw_weights

DIM = 16
LONGEST_PROMPT = 6
"""Tokens that the language model writes at most."""


def ernie_image(rewrites: bool = True) -> ErnieImagePipeline:
    """Build the pipeline, with its language model or without."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *LETTERS]
    tokenizer = GemmaTokenizer({piece: index for index, piece in enumerate(pieces)})
    writer = GemmaTokenizer({piece: index for index, piece in enumerate(pieces)})
    writer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    writer.model_max_length = LONGEST_PROMPT
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=DIM,
        intermediate_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=DIM // 2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    pipeline = ErnieImagePipeline(
        transformer=ErnieImageTransformer2DModel(
            hidden_size=DIM,
            num_attention_heads=2,
            num_layers=1,
            ffn_hidden_size=DIM,
            in_channels=4 * LATENT_CHANNELS,
            out_channels=4 * LATENT_CHANNELS,
            text_in_dim=DIM,
            rope_axes_dim=(4, 2, 2),
        ),
        vae=AutoencoderKLFlux2(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
            latent_channels=LATENT_CHANNELS,
        ),
        text_encoder=MistralModel(config),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        pe=MistralForCausalLM(config) if rewrites else None,
        pe_tokenizer=writer if rewrites else None,
    )
    draw_weights(pipeline)
    return pipeline
