"""Tiny networks and tokenizers with random weights, the parts of `tests.tiny_pipelines`."""

from string import ascii_lowercase

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
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

from serve_app.demo.tokenizer import build_tokenizer
from tools.demo_model.scenes import vocabulary

WIDTH_PX, HEIGHT_PX = 64, 32
"""Size that the networks are built for; not square, so that a swapped pair shows."""

LATENT_CHANNELS = 4
CLIP_DIM = 32
T5_DIM = 2 * CLIP_DIM
"""Width of the T5 encoding, to which SD3 pads the two concatenated CLIP encodings."""

LETTERS = ["▁", *ascii_lowercase]
"""Alphabet of the SentencePiece tokenizers; the first letter stands for a space."""


def draw_weights(pipeline: DiffusionPipeline) -> None:
    """Draw every weight, so that no layer is zero and each passes its input on.

    The scales of norms stay at one. Other weights get the spread that keeps the variance from input
    to output. With the usual small spread, the biases would hide the prompt.
    """
    generator = torch.Generator().manual_seed(0)
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    with torch.no_grad():
        for network in networks:
            for weights in network.parameters():
                if not bool((weights == 1).all()):
                    spread = weights[0].numel() ** -0.5 if weights.ndim > 1 else 0.1
                    weights.normal_(0.0, spread, generator=generator)


def autoencoder(
    channels: int = LATENT_CHANNELS, blocks: int = 2, **config: object
) -> AutoencoderKL:
    """Build a VAE; with two blocks, its latent cell has two pixels a side."""
    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        **config,
    )


def unet(cross_attention_dim: int, **config: object) -> UNet2DConditionModel:
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


def clip(
    kind: type[CLIPTextModel] | type[CLIPTextModelWithProjection],
) -> tuple[CLIPTokenizer, CLIPTextModel | CLIPTextModelWithProjection]:
    tokenizer = build_tokenizer(vocabulary())
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        hidden_size=CLIP_DIM,
        intermediate_size=CLIP_DIM,
        projection_dim=CLIP_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, kind(config)


def t5() -> tuple[T5Tokenizer, T5EncoderModel]:
    """Build a T5 encoder; its tokenizer has the words of the demo model, and letters."""
    scores = dict.fromkeys(["<pad>", "</s>", "<unk>"], 0.0) | dict.fromkeys(LETTERS, -10.0)
    scores |= dict.fromkeys((f"▁{word}" for word in vocabulary()), -5.0)
    tokenizer = T5Tokenizer(list(scores.items()), extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_DIM,
        d_kv=16,
        d_ff=T5_DIM,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer, T5EncoderModel(config)
