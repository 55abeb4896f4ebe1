"""The full-size networks have as many weights as the published ones; none of them is allocated."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import Gemma2Config, Gemma2Model

from tests import full_size, published_networks, tiny_pipelines

PUBLISHED: dict[str, tuple[Callable[[DiffusionPipeline], nn.Module], int]] = {
    "SD 1.5 UNet": (lambda _: full_size.sd15_unet(), 859_520_964),
    "SDXL UNet": (lambda _: full_size.sdxl_unet(), 2_567_463_684),
    "FLUX.1 dev transformer": (lambda _: full_size.flux_transformer(), 11_901_408_320),
    "SD 1.5 and SDXL VAE": (lambda _: full_size.autoencoder(), 83_653_863),
    "FLUX.1 VAE": (lambda _: full_size.flux_autoencoder(), 83_819_683),
    "CLIP-L": (lambda tiny: full_size.clip_l(tiny.tokenizer), 123_060_480),
    "OpenCLIP bigG": (lambda tiny: full_size.clip_big_g(tiny.tokenizer), 694_659_840),
    "T5-XXL encoder": (lambda tiny: full_size.t5_xxl(tiny.tokenizer_2), 4_762_310_656),
}
"""The builder of each network, given a pipeline with tokenizers, and its number of weights."""

COUNTED: dict[str, tuple[Callable[[], Any], int]] = {
    "CLIP-L with projection": (published_networks.clip_l_with_projection, 123_650_304),
    "SD 3.5 Medium transformer": (published_networks.sd35_medium_transformer, 2_243_171_520),
    "SD 3.5 Large transformer": (published_networks.sd35_large_transformer, 8_056_627_520),
    "FLUX.1 schnell transformer": (
        published_networks.flux_schnell_transformer,
        11_891_178_560,
    ),
    "FLUX.2 klein 4B transformer": (published_networks.flux2_klein_transformer, 3_875_544_576),
    "FLUX.2 VAE": (AutoencoderKLFlux2, 84_046_115),
    "Z-Image transformer": (ZImageTransformer2DModel, 6_154_908_736),
    "Qwen3 4B": (published_networks.qwen3_4b, 4_022_468_096),
    "Qwen-Image transformer": (QwenImageTransformer2DModel, 20_430_401_088),
    "Qwen2.5-VL 7B": (published_networks.qwen25_vl_7b, 8_292_166_656),
    "Qwen-Image VAE": (AutoencoderKLQwenImage, 126_892_531),
    "Sana 1.6B transformer": (SanaTransformer2DModel, 1_604_462_752),
    "Gemma 2 2B": (lambda: Gemma2Model(Gemma2Config()), 2_614_341_888),
    "DC-AE f32": (published_networks.dc_ae, 312_250_275),
    "PixArt-Sigma transformer": (published_networks.pixart_sigma_transformer, 610_856_096),
}
"""Builders that need no tokenizer, and the number of weights."""


def _weights(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_many_weights_as_published(name: str) -> None:
    build, weights = PUBLISHED[name]
    tiny = tiny_pipelines.flux()
    with torch.device("meta"):
        network = build(tiny)
    assert _weights(network) == weights


@pytest.mark.parametrize("name", COUNTED)
def test_networks_of_the_configs_have_the_listed_number_of_weights(name: str) -> None:
    build, weights = COUNTED[name]
    with torch.device("meta"):
        network = build()
    assert _weights(network) == weights
