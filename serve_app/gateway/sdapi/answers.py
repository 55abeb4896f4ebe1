"""Answers of this API, as pydantic models, and the text that its tools read from images."""

import base64
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from serve_app import __version__
from serve_app.gateway.file_text import with_text
from serve_app.gateway.infotext import infotext
from serve_app.gateway.schemas import ErrorResponse, ImagesResponse
from serve_app.gateway.sdapi.fields import CHECKPOINT, SdapiRequest
from serve_app.gateway.sdapi.running import Overview
from serve_app.gateway.sdapi.samplers import (
    ALIASES,
    AUTOMATIC,
    sampler_names,
    sampler_of,
    spacing_names,
)
from serve_app.protocol.params import GenerationParams, ModelInfo


class Item(BaseModel):
    """An entry of a list."""

    model_config = ConfigDict(protected_namespaces=())

    name: str = Field(description="Name in requests.")


class SamplerItem(Item):
    """A sampler."""

    aliases: list[str] = Field(description="Further names.")
    options: dict[str, str] = Field(description="Empty.")


class SchedulerItem(Item):
    """A spacing of the noise levels."""

    label: str = Field(description="The same name.")
    aliases: list[str] | None = Field(None, description="None.")
    default_rho: float | None = Field(None, description="None.")
    need_inner_model: bool | None = Field(None, description="None.")


class LoraItem(Item):
    """A LoRA adapter."""

    alias: str = Field(description="The same name.")
    path: str = Field(description="The same name: paths of the server are not shown.")
    metadata: dict[str, str] = Field(description="Empty.")


class UpscalerItem(Item):
    """An upscaler. There is one, which does nothing."""

    name: str = Field("None", description="None.")
    model_name: str | None = Field(None, description="None.")
    model_path: str | None = Field(None, description="None.")
    model_url: str | None = Field(None, description="None.")
    scale: float | None = Field(1.0, description="1.")


class ModelItem(BaseModel):
    """The served model."""

    model_config = ConfigDict(protected_namespaces=())

    title: str = Field(description=f"Name for `{CHECKPOINT}`.")
    model_name: str = Field(description="The same name.")
    hash: str | None = Field(None, description="None.")
    sha256: str | None = Field(None, description="None.")
    filename: str = Field(description="The same name: paths of the server are not shown.")
    config: str | None = Field(None, description="None.")


class FileItem(BaseModel):
    """A file that a client may choose. There is none."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str = Field(description="Name in requests.")
    filename: str = Field(description="The same name.")


class Embeddings(BaseModel):
    """Embeddings. There are none."""

    loaded: dict[str, str] = Field({}, description="Empty.")
    skipped: dict[str, str] = Field({}, description="Empty.")


class Memory(BaseModel):
    """Memory, which the gateway does not know: replicas are on other machines."""

    ram: dict[str, str] = Field(description="A reason.")
    cuda: dict[str, str] = Field(description="A reason.")


class Options(BaseModel):
    """Settings that clients read."""

    sd_model_checkpoint: str = Field(description="The served model, or the first of several.")
    sd_vae: str = Field("Automatic", description="Always `Automatic`.")
    samples_format: str = Field("png", description="Always `png`.")
    CLIP_stop_at_last_layers: int = Field(1, description="Always 1.")


class State(BaseModel):
    """State of the running requests."""

    job: str = Field("", description="Empty.")
    job_count: int = Field(description="Number of running requests of this key.")
    job_no: int = Field(0, description="Always 0.")
    job_timestamp: str = Field("0", description="Always 0.")
    skipped: bool = Field(False, description="Always false.")
    interrupted: bool = Field(False, description="Always false.")
    stopping_generation: bool = Field(False, description="Always false.")
    sampling_step: int = Field(description="Steps of the oldest request that are done.")
    sampling_steps: int = Field(description="Steps of the oldest request.")


class ProgressAnswer(BaseModel):
    """Progress of this key's requests on this gateway replica."""

    progress: float = Field(description="From 0 to 1; 0 without a running request.")
    eta_relative: float = Field(description="Predicted seconds until they are done.")
    state: State = Field(description="State of the running requests.")
    current_image: str | None = Field(None, description="Always null.")
    textinfo: str | None = Field(None, description="Always null.")


class GenerationAnswer(BaseModel):
    """Generated images."""

    images: list[str] = Field(description="PNG files in base64, in the order of their seeds.")
    parameters: dict[str, Any] = Field(
        description="Fields of the request that had an effect, without images and settings."
    )
    info: str = Field(
        description="A JSON object as text: `infotexts`, `all_seeds`, `warnings` and others."
    )


class SdapiError(ErrorResponse):
    """An error: OpenAI's object, and its message once more, where clients of this API look."""

    detail: str = Field(description="Message of the error.")


def samplers(model: ModelInfo) -> list[SamplerItem]:
    """List the samplers. The first one is the model's own."""
    own = SamplerItem(name=AUTOMATIC, aliases=[], options={})
    offered = [
        SamplerItem(name=name, aliases=[*ALIASES.get(ours, ()), ours], options={})
        for name, ours in sampler_names(model).items()
    ]
    return [own, *offered]


def schedulers(model: ModelInfo) -> list[SchedulerItem]:
    """List the spacings of noise levels. The first one is the model's own."""
    own = SchedulerItem(name=AUTOMATIC.lower(), label=AUTOMATIC)
    offered = spacing_names(model).items()
    return [own, *(SchedulerItem(name=name, label=label) for name, label in offered)]


def loras(names: Iterable[str]) -> list[LoraItem]:
    """List the LoRA adapters."""
    return [LoraItem(name=name, alias=name, path=name, metadata={}) for name in names]


def models(ids: Iterable[str]) -> list[ModelItem]:
    """List the models, the default one first."""
    return [ModelItem(title=name, model_name=name, filename=name) for name in ids]


def progress(overview: Overview) -> ProgressAnswer:
    """Describe the progress of a key's requests."""
    return ProgressAnswer(
        progress=overview.progress,
        eta_relative=overview.remaining_s,
        state=State(
            job_count=overview.requests,
            sampling_step=overview.step,
            sampling_steps=overview.steps,
        ),
    )


def generated(
    given: SdapiRequest,
    images: Sequence[GenerationParams],
    response: ImagesResponse,
    model: ModelInfo,
) -> GenerationAnswer:
    """Make the answer for generated images. Takes milliseconds for each: not for the event loop."""
    width, height = map(int, response.size.split("x"))
    sampler, spacing = sampler_of(images[0].noise_scheduler)
    # The prompt as it came: its tags stand where the client put them.
    texts = [
        infotext(replace(params, prompt=given.prompt, lora=()), response.size, model.id)
        for params in images
    ]
    files = [
        with_text(base64.b64decode(image.b64_json), "png", text)
        for image, text in zip(response.data, texts, strict=True)
    ]
    seeds = [image.seed for image in response.data]
    count = len(seeds)
    info = {
        "prompt": given.prompt,
        "all_prompts": [given.prompt] * count,
        "negative_prompt": given.negative_prompt,
        "all_negative_prompts": [given.negative_prompt] * count,
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": -1,
        "all_subseeds": [-1] * count,
        "subseed_strength": 0,
        "width": width,
        "height": height,
        "sampler_name": sampler,
        "scheduler": spacing,
        "cfg_scale": images[0].guidance_scale,
        "steps": images[0].num_inference_steps,
        "batch_size": given.batch_size,
        "restore_faces": False,
        "sd_model_name": model.id,
        "sd_model_hash": None,
        "denoising_strength": images[0].strength,
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.gmtime(response.created)),
        "clip_skip": 1,
        "version": f"diffusion-serve {__version__}",
        "warnings": response.warnings,
    }
    fields = given.model_dump(include=given.model_fields_set & type(given).model_fields.keys())
    for name in ("init_images", "mask", "override_settings"):  # its values may be anything
        fields.pop(name, None)
    return GenerationAnswer(
        images=[base64.b64encode(file).decode() for file in files],
        parameters=fields | {"seed": given.seed},
        info=json.dumps(info),
    )
