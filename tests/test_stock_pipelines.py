"""What the source of diffusers tells of its classes is what its classes tell themselves."""

import inspect

import diffusers
import pytest
from diffusers import DiffusionPipeline

from serve_app.config.stock_pipelines import (
    has_own_module,
    is_network,
    is_stock,
    read_pipeline_source,
)

PIPELINES = [
    name
    for names in ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux", "Sana")
    for name in (f"{names}Pipeline", f"{names}Img2ImgPipeline")
    if hasattr(diffusers, name)
] + [
    "QwenImagePipeline",
    "WanPipeline",
    "DDPMPipeline",
    "ChronoEditPipeline",
    "AnimateDiffPipeline",
]


@pytest.mark.parametrize("name", PIPELINES)
def test_signatures_are_those_of_the_class(name: str) -> None:
    pipeline: type[DiffusionPipeline] = getattr(diffusers, name)
    source = read_pipeline_source(name)
    assert source is not None
    assert source.optional_components == set(pipeline._optional_components)
    for function, signature in (
        (pipeline.__init__, source.components),
        (pipeline.__call__, source.call),
    ):
        assert signature is not None
        parameters = dict(inspect.signature(function).parameters)
        parameters.pop("self")
        named = {
            name: parameter
            for name, parameter in parameters.items()
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        }
        assert signature.names == named.keys()
        required = {name for name, p in named.items() if p.default is inspect.Parameter.empty}
        assert signature.required == required


def test_classes_are_told_by_their_kind() -> None:
    assert is_stock("UNet2DConditionModel")
    assert is_stock("NoSuchModel") is False
    assert is_network("UNet2DConditionModel")
    assert is_network("MotionAdapter")
    assert not is_network("PNDMScheduler")
    assert has_own_module("stable_diffusion")
    assert not has_own_module("transformers")
    assert read_pipeline_source("NoSuchPipeline") is None
