"""The tasks of a stock pipeline, read off its signature and its networks.

Whether a call really works without an image, or with several, is tried at start-up.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from serve_app.engine.model.inspection import call_parameters, default_argument
from serve_app.protocol.params import Task

_CONTROLS = ("controlnet", "adapter")
"""Components that read a control image. For a pipeline with one, ``image`` means that image."""


def own_image_task(pipeline: DiffusionPipeline) -> Task | None:
    """Return the task for which the pipeline's own call takes an image; ``None`` if it takes none.

    Pipelines for videos or with control images take no image to edit.
    """
    parameters = call_parameters(pipeline)
    if "image" not in parameters or "num_frames" in parameters:
        return None
    if any(pipeline.components.get(name) is not None for name in _CONTROLS):
        return None
    return "inpainting" if "mask_image" in parameters else "image-to-image"


def pipelines_by_task(pipeline: DiffusionPipeline) -> dict[Task, DiffusionPipeline]:
    """Return the pipeline and its family's pipelines for other tasks, on the same networks.

    The first task is text-to-image. It is a guess where the pipeline's own call takes an image.
    """
    found: dict[Task, DiffusionPipeline] = {"text-to-image": pipeline}
    own = own_image_task(pipeline)
    if own is not None:
        found[own] = pipeline
    if _reads_more_than_latents(pipeline):  # no other pipeline of the family has the rest
        return found
    makers: dict[Task, Any] = {
        "image-to-image": diffusers.AutoPipelineForImage2Image,
        "inpainting": diffusers.AutoPipelineForInpainting,
    }
    for task, maker in makers.items():
        if task not in found:
            with contextlib.suppress(ValueError):  # diffusers has none for this family
                found[task] = maker.from_pipe(pipeline)
    return found


def _reads_more_than_latents(pipeline: DiffusionPipeline) -> bool:
    """Return True if the UNet has further inputs beside the latents, such as a masked image."""
    components = pipeline.components
    configs = (getattr(components.get(name), "config", {}) for name in ("unet", "vae"))
    inputs, latents = (
        config.get(key)
        for config, key in zip(configs, ("in_channels", "latent_channels"), strict=True)
    )
    return None not in (inputs, latents) and inputs != latents


def default_strengths(pipelines: Mapping[Task, DiffusionPipeline]) -> dict[Task, float]:
    """Return the default strength of each task that takes one."""
    found: dict[Task, float] = {}
    for task, pipeline in pipelines.items():
        strength = default_argument(pipeline, "strength")
        if task != "text-to-image" and isinstance(strength, int | float):
            found[task] = float(strength)
    return found
