"""Models whose pipelines need an image: found out at start-up, and batched like the others."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from inspect import signature
from itertools import combinations
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, Flux2KleinInpaintPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from serve_app.config.limits import LimitsConfig
from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.inspection import check_input_images
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.errors import InvalidRequest
from serve_app.protocol.params import GenerationParams
from tests.edit_pipelines import EDITS, IN_MEMORY, few_pixels, flux_2_klein
from tests.engine.engines import TOLERANCE, result_of

ENGINE = EngineConfig(scheduling="fifo", max_batch_size=4, limits=LimitsConfig(max_input_images=2))

SEVERAL = ("qwen-image-edit-plus", "flux-2-klein")
"""Pipelines that take several images."""

VISIBLE = 5 / 255
"""Least difference of a pixel in [0, 1] that people see."""

WITHOUT_NEGATIVE = ("flux-kontext", "flux-fill", "flux-2-klein")
"""Pipelines without a negative prompt."""

pytestmark = pytest.mark.usefixtures("reused_starts")


def size_of(name: str) -> tuple[int, int]:
    """Return the size of a pipeline's images. FLUX.2 needs 64 pixels a side."""
    return (128, 64) if name == "flux-2-klein" else (64, 32)


def picture(color: str, size: tuple[int, int]) -> Image.Image:
    """Draw a ring of a color on grey."""
    image = Image.new("RGB", size, "grey")
    ImageDraw.Draw(image).ellipse((4, 4, size[1] - 4, size[1] - 4), outline=color, width=4)
    return image


def half(size: tuple[int, int]) -> Image.Image:
    """Draw a mask of the left half."""
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def with_second(params: GenerationParams, upright: bool = False) -> GenerationParams:
    """Return the request with a second image, of as many pixels as the first one."""
    assert params.image is not None
    width, height = params.image.size
    size = (height, width) if upright else (width, height)
    return replace(params, more_images=(picture("yellow", size),))


@pytest.fixture(scope="module", params=EDITS)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """The config of a pipeline, saved to a folder where that is possible."""
    name: str = request.param
    folder = tmp_path_factory.mktemp(name)
    build, call_kwargs, _ = EDITS[name]
    if name not in IN_MEMORY:
        build().save_pretrained(folder, safe_serialization=True)
    return ModelConfig(
        id=name,
        path=str(folder),
        device="cpu",
        default_size_px=size_of(name),
        call_kwargs=call_kwargs,
    )


@pytest.fixture(scope="module")
def pipeline(config: ModelConfig) -> Iterator[LoadedPipeline]:
    """The loaded pipeline."""
    with few_pixels():
        if config.id in IN_MEMORY:
            yield LoadedPipeline(EDITS[config.id][0](), config)
        else:
            yield LoadedPipeline.load(config)


def _requests(name: str) -> list[GenerationParams]:
    """Return edits that differ in everything but the size."""
    size = size_of(name)
    # Qwen-Image-Edit takes one prompt at a time, from which the start cannot learn its length.
    longer = "" if "qwen" in name else " on a white background"
    other = f"a green circle{longer}"
    first = GenerationParams(
        "a red circle",
        1,
        width=size[0],
        height=size[1],
        num_inference_steps=4,
        guidance_scale=4.0,
        negative_prompt="a square" if name not in WITHOUT_NEGATIVE else None,
        image=picture("red", size),
        mask_image=half(size) if EDITS[name][2] == ("inpainting",) else None,
    )
    return [
        first,
        replace(first, prompt=other, seed=2, image=picture("green", size)),
        replace(first, seed=3, num_inference_steps=6, image=picture("blue", size)),
        replace(first, seed=4, guidance_scale=1.0),
    ]


def _difference(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max()) if one.shape == two.shape else 1.0


def _stock_image(config: ModelConfig, params: GenerationParams) -> Tensor:
    """Return the image of diffusers alone, without any code of the server."""
    if config.id in IN_MEMORY:
        pipeline = EDITS[config.id][0]()
    else:
        pipeline = DiffusionPipeline.from_pretrained(config.source, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {
        "width": params.width,
        "height": params.height,
        "mask_image": params.mask_image,
        "negative_prompt": params.negative_prompt,
        "guidance_scale" if "qwen" not in config.id else "true_cfg_scale": params.guidance_scale,
    }
    known = signature(type(pipeline).__call__).parameters
    output = pipeline(
        prompt=params.prompt,
        image=[params.image, *params.more_images] if params.more_images else params.image,
        num_inference_steps=params.num_inference_steps,
        generator=torch.Generator().manual_seed(params.seed),
        output_type="pt",
        **config.call_kwargs,
        **{name: value for name, value in given.items() if name in known and value is not None},
    )
    image: Tensor = output.images[0]
    return image


def test_alone_equals_stock_diffusers(config: ModelConfig, pipeline: LoadedPipeline) -> None:
    [params, *more] = _requests(config.id)[1:3]
    if config.id in SEVERAL:
        more = [with_second(params)]
    with Engine(pipeline, config, ENGINE) as engine:
        for request in (params, *more):
            ours = engine.generate(request).pixels
            assert _difference(ours, _stock_image(config, request)) <= TOLERANCE


def test_together_equals_alone(
    config: ModelConfig, pipeline: LoadedPipeline, report: Callable[[str], None]
) -> None:
    requests = _requests(config.id)
    if config.id in SEVERAL:
        # As many tokens, which the networks must not take for the same positions.
        requests += [with_second(requests[0]), with_second(requests[1], upright=True)]
    with Engine(pipeline, config, ENGINE) as engine:
        assert engine.info.sharing == "batched", engine.info.sharing_note
        assert engine.info.tasks == EDITS[config.id][2]
        assert engine.info.max_input_images == 1 + (config.id in SEVERAL)
        streams = [engine.stream(params) for params in requests]
        together = [result_of(list(stream)).pixels for stream in streams]
        mean = engine.stats().mean_batch_size
    alone = [pipeline.generate(params)[0] for params in requests]
    differences = [_difference(a, b) for a, b in zip(alone, together, strict=True)]
    report(
        f"{pipeline.class_name}: largest difference of edits from alone {max(differences):.1e}, "
        f"mean batch size {mean:.2f}"
    )
    assert differences == pytest.approx([0.0] * len(requests), abs=TOLERANCE)
    assert mean > 1.5
    for one, two in combinations(together, 2):
        assert _difference(one, two) > VISIBLE


def test_an_image_that_the_pipeline_does_not_take_is_rejected() -> None:
    """FLUX.2's own call raises, so the request would fail as if the model were broken."""
    size = size_of("flux-2-klein")
    call_kwargs = EDITS["flux-2-klein"][1]
    config = ModelConfig(id="m", device="cpu", default_size_px=size, call_kwargs=call_kwargs)
    stock = flux_2_klein()
    small = GenerationParams("a red circle", 1, image=picture("red", (32, 32)))
    large = replace(small, image=picture("red", size))
    with Engine(LoadedPipeline(stock, config), config, ENGINE) as engine:
        for params, reason in (
            (small, "to 32x32 pixels: Image too small"),
            (replace(small, width=32, height=64), "to 32x64 pixels: Image too small"),
            (replace(small, width=640, height=64), "to 640x64 pixels: Aspect ratio too extreme"),
            (replace(large, more_images=(picture("red", (48, 96)),)), "to 48x96 pixels: Image too"),
        ):
            with pytest.raises(InvalidRequest, match=reason):
                engine.generate(params)
        for params in (
            replace(small, image=None, width=32, height=32),
            replace(small, width=64, height=64),
        ):
            assert engine.generate(replace(params, num_inference_steps=2)).pixels.ndim == 3
    # It has the same image processor, and its call does not use the check.
    components = {**stock.components, "is_distilled": False}
    check_input_images(Flux2KleinInpaintPipeline(**components), [picture("red", (32, 32))])


def test_a_prompt_alone_is_rejected(config: ModelConfig, pipeline: LoadedPipeline) -> None:
    params = GenerationParams("a red circle", 1)
    if "text-to-image" in EDITS[config.id][2]:
        pytest.skip("this one needs no image")
    with (
        Engine(pipeline, config, ENGINE) as engine,
        pytest.raises(InvalidRequest, match="nothing from a prompt alone; send an image"),
    ):
        engine.generate(params)
