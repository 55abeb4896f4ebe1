"""Every config of a published model is loaded, certified and served as a tiny twin.

The twin has the pipeline class of the model, and the call of the config: its steps, its guidance
and its further arguments. Only the weights, and with them the size, are small.
"""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import httpx
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerAncestralDiscreteScheduler
from PIL import Image

from serve_app.config.models import AppConfig, parse_app_config
from serve_app.config.serve_file import read_applications
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.gateway.auth import KeyRing
from serve_app.gateway.routes import create_api
from serve_app.protocol.params import GenerationParams
from tests import edit_pipelines, more_pipelines, tiny_flux2, tiny_pipelines
from tests.deployments.test_generator import Replica
from tests.edit_pipelines import IN_MEMORY, few_pixels
from tests.engine.engines import TOLERANCE
from tests.serve_configs import FOLDER
from tests.tiny_networks import HEIGHT_PX, WIDTH_PX

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("reused_starts"),
    pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning"),
]

PROMPT, SEED = "a red circle on a blue background", 7

ROUNDED = 0.51 / 255
"""Largest difference of a pixel in [0, 1] between an image and its file with 8 bits."""


@dataclass(frozen=True)
class Twin:
    """A tiny pipeline in place of a published model.

    Attributes:
        build: builds the pipeline.
        size_px: width and height of its images.
        edits: True for a model whose requests have an input image.
        call_kwargs: further call arguments, where one sets the size.
    """

    build: Callable[[], DiffusionPipeline]
    size_px: tuple[int, int] = (WIDTH_PX, HEIGHT_PX)
    edits: bool = False
    call_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def image(self) -> Image.Image | None:
        """The input image of a request: a gradient of the size of the result."""
        if not self.edits:
            return None
        gradient = Image.linear_gradient("L").resize(self.size_px)
        return Image.merge("RGB", (gradient, gradient.rotate(180), gradient))


def sdxl_turbo() -> DiffusionPipeline:
    """Build SDXL with the noise scheduler of SDXL-Turbo, which adds noise in each step."""
    pipeline = tiny_pipelines.sdxl()
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing"
    )
    return pipeline


def sana() -> DiffusionPipeline:
    """Build Sana for 512 pixels a side, the fewest of its training, in cells of 32 pixels."""
    pipeline = tiny_pipelines.sana(vae_blocks=6)
    pipeline.transformer.register_to_config(sample_size=512 // 32)
    return pipeline


TWINS: dict[str, Twin] = {
    "sd15": Twin(tiny_pipelines.stable_diffusion),
    "sdxl": Twin(tiny_pipelines.sdxl),
    "sdxl-turbo": Twin(sdxl_turbo),
    "sd35-medium": Twin(tiny_pipelines.sd3),
    "sd35-large": Twin(tiny_pipelines.sd3),
    "flux-schnell": Twin(more_pipelines.flux_schnell),
    "flux-dev": Twin(tiny_pipelines.flux),
    # The pipeline scales each image to as many pixels as its call names.
    "flux-kontext": Twin(
        more_pipelines.kontext,
        edits=True,
        call_kwargs={"max_area": WIDTH_PX * HEIGHT_PX, "_auto_resize": False},
    ),
    "flux2-klein": Twin(tiny_flux2.flux2_klein, (64, 64)),
    "z-image-turbo": Twin(more_pipelines.z_image),
    "qwen-image": Twin(tiny_pipelines.qwen_image),
    "qwen-image-edit": Twin(edit_pipelines.qwen_image_edit, edits=True),
    # These two choose among the sizes of their training, so their cells are those of the model.
    "sana": Twin(sana, (512, 512)),
    "pixart-sigma": Twin(lambda: tiny_pipelines.pixart_sigma(vae_blocks=4), (256, 256)),
}


def twin_config(name: str, folder: Path) -> AppConfig:
    """Return the application of a config with its twin in the place of the model."""
    [application] = read_applications(FOLDER / f"{name}.yaml")
    arguments: dict[str, Any] = application["args"]
    arguments["model"] |= {
        "path": str(folder),
        "device": "cpu",
        "dtype": "float32",
        "default_size_px": list(TWINS[name].size_px),
        "call_kwargs": arguments["model"].get("call_kwargs", {}) | TWINS[name].call_kwargs,
    }
    return parse_app_config(arguments)


def stock_image(pipeline: DiffusionPipeline, config: AppConfig) -> torch.Tensor:
    """Return what diffusers generates for the arguments of the config."""
    model = config.model
    pipeline.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"guidance_scale": model.default_guidance_scale}
    if type(pipeline).__name__.startswith("QwenImage"):  # as its card calls it
        given = {"true_cfg_scale": model.default_guidance_scale, "negative_prompt": " "}
    if (image := TWINS[model.id].image) is not None:
        given["image"] = image
    assert model.default_size_px is not None
    width, height = model.default_size_px
    pixels: torch.Tensor = pipeline(
        prompt=PROMPT,
        width=width,
        height=height,
        num_inference_steps=model.default_steps,
        generator=torch.Generator().manual_seed(SEED),
        output_type="pt",
        **given,
        **model.call_kwargs,
    ).images[0]
    return pixels


async def image_of_the_api(config: AppConfig, engine: Engine) -> torch.Tensor:
    """Send a request with a prompt, a seed and, to an edit model, an image: nothing else is set."""
    api = create_api(config, Replica(engine), KeyRing(None, None))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(api), base_url="http://test"
    ) as client:
        body: dict[str, Any] = {"model": config.model.id, "prompt": PROMPT, "seed": SEED}
        path = "/v1/images/generations"
        if (image := TWINS[config.model.id].image) is not None:
            file = io.BytesIO()
            image.save(file, "PNG")
            data = base64.b64encode(file.getvalue()).decode()
            body["images"] = [{"image_url": f"data:image/png;base64,{data}"}]
            path = "/v1/images/edits"
        response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    result = io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"]))
    return torch.from_numpy(np.asarray(Image.open(result)).copy()).permute(2, 0, 1) / 255


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_is_certified_and_served(name: str, tmp_path: Path) -> None:
    twin = TWINS[name]
    variant = twin_config(name, tmp_path).model.variant
    if name not in IN_MEMORY:
        twin.build().save_pretrained(tmp_path, variant=variant)
    config = twin_config(name, tmp_path)
    if name in IN_MEMORY:
        stock, loaded = twin.build(), LoadedPipeline(twin.build(), config.model)
    else:
        stock = DiffusionPipeline.from_pretrained(tmp_path, variant=variant)
        loaded = LoadedPipeline.load(config.model)
    with few_pixels(), Engine(loaded, config.model, config.engine) as engine:
        assert engine.info.sharing == "batched", engine.info.sharing_note
        image = engine.generate(GenerationParams(PROMPT, SEED, image=twin.image)).pixels
        served = anyio.run(image_of_the_api, config, engine)
        expected = stock_image(stock, config)
    assert (image - expected).abs().max() <= TOLERANCE
    assert (served - expected).abs().max() <= ROUNDED
