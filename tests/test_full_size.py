"""The full-size networks have as many weights as the published ones; none of them is allocated."""

from collections.abc import Callable

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from tests import full_size, tiny_pipelines

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


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_many_weights_as_published(name: str) -> None:
    build, weights = PUBLISHED[name]
    tiny = tiny_pipelines.flux()
    with torch.device("meta"):
        network = build(tiny)
    assert sum(parameter.numel() for parameter in network.parameters()) == weights
