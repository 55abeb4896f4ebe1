"""From bodies of this API to requests of the images API, and errors back to the names here."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from serve_app.errors import InvalidRequest
from serve_app.gateway.image_request import (
    ImageEditRequest,
    ImageGenerationRequest,
    ImageRequest,
)
from serve_app.gateway.sdapi.fields import ImageToImageRequest, SdapiRequest
from serve_app.gateway.sdapi.samplers import noise_scheduler_of
from serve_app.protocol.params import ModelInfo

_TAG = re.compile(r"<(lora|lyco|hypernet):([^<>:]+)((?::[^<>:]*)*)>")
"""An adapter in a prompt: ``<lora:NAME>`` or ``<lora:NAME:SCALE>``."""

_EMPHASIS = re.compile(r"\([^()]*:\s*\d*\.?\d+\s*\)")
"""A weight in a prompt: ``(word:1.2)``."""

_NAMES = {
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "strength": "denoising_strength",
    "scheduler": "sampler_name",
    "lora": "prompt",
    "n": "batch_size * n_iter",
    "size": "width, height",
    "image": "init_images",
    "mask_image": "mask",
    "model": "sd_model_checkpoint",
}
"""Names here of the fields that errors name."""


class Adapters(NamedTuple):
    """The adapters of a prompt, and the prompt without them."""

    prompt: str
    scales: dict[str, float]


@dataclass(frozen=True)
class Translation:
    """A request of the images API."""

    body: ImageRequest
    warnings: tuple[str, ...]


def translate(given: SdapiRequest, model: ModelInfo) -> Translation:
    """Translate a body. Its images are not decoded here.

    Raises:
        InvalidRequest: a field cannot be honoured, or names what the model does not have.
    """
    warnings = given.check()
    prompt, scales = read_adapters(given.prompt)
    if _EMPHASIS.search(prompt):
        warnings.append("weights in the prompt, such as (word:1.2), are read as plain text.")
    sampler = given.sampler_name or given.sampler_index
    noise_scheduler, about_it = noise_scheduler_of(sampler, given.scheduler, model)
    fields = {
        "prompt": prompt,
        "negative_prompt": given.negative_prompt,
        "n": given.batch_size * given.n_iter,
        "size": _size(given, model),
        "num_inference_steps": given.steps,
        "guidance_scale": given.cfg_scale,
        "seed": None if given.seed < 0 else given.seed,
        "scheduler": noise_scheduler,
        "acceleration": given.acceleration,
        "lora": scales,
    }
    body: ImageRequest
    if isinstance(given, ImageToImageRequest):
        body = ImageEditRequest.model_validate(fields | {"strength": given.denoising_strength})
    else:
        body = ImageGenerationRequest.model_validate(fields)
    return Translation(body, (*warnings, *about_it))


def read_adapters(prompt: str) -> Adapters:
    """Take the adapters out of a prompt.

    Raises:
        InvalidRequest: a tag cannot be read, or names an adapter again.
    """
    scales: dict[str, float] = {}
    for tag in _TAG.finditer(prompt):
        kind, name, rest = tag.groups()
        shown = tag.group()[:100]
        if kind == "hypernet":
            raise InvalidRequest(f"prompt: {shown}: there are no hypernetworks here.", "prompt")
        if name in scales:
            raise InvalidRequest(f"prompt: {shown}: an adapter is named twice.", "prompt")
        texts = rest.split(":")[1:] or ["1"]
        try:
            values = {float(text) for text in texts}
        except ValueError:
            values = set()
        if len(values) != 1 or not all(map(math.isfinite, values)):
            raise InvalidRequest(
                f"prompt: {shown}: an adapter has one scale, as in <lora:{name[:40]}:0.8>.",
                "prompt",
            )
        [scales[name]] = values
    return Adapters(_TAG.sub("", prompt).strip() if scales else prompt, scales)


@contextmanager
def renamed() -> Iterator[None]:
    """Name the field of an error as this API does. For calls that know the other API's names."""
    try:
        yield
    except InvalidRequest as error:
        name = _NAMES.get(error.param or "")
        if name is None:
            raise
        raise type(error)(re.sub(rf"^{error.param}\b", name, error.message), name) from error


def _size(given: SdapiRequest, model: ModelInfo) -> str | None:
    """Return the size; a side that is left out is the model's. ``None`` if both are."""
    if given.width is None and given.height is None:
        return None
    return f"{given.width or model.default_width}x{given.height or model.default_height}"
