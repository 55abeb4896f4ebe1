"""Fields of a request that change nothing in the image of its pipeline."""

from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline

from serve_app.engine.model import inspection
from serve_app.protocol.params import GenerationParams


def unused_fields(
    params: GenerationParams,
    pipeline: DiffusionPipeline,
    scale_name: str,
    configured: Mapping[str, Any],
) -> tuple[str, ...]:
    """Return a warning for each field that a request sets in vain.

    Args:
        params: the request.
        pipeline: the pipeline of its task.
        scale_name: parameter of the pipeline that sets the guidance.
        configured: arguments of the call that the model's config sets.
    """
    found = []
    name = type(pipeline).__name__
    parameters = inspection.call_parameters(pipeline)
    scale = params.guidance_scale
    if scale is not None and scale_name not in parameters:
        found.append(f"guidance_scale has no effect: {name} has none.")
    if params.negative_prompt:
        if scale is None:
            scale = configured.get(scale_name, inspection.default_argument(pipeline, scale_name))
        if "negative_prompt" not in parameters:
            found.append(f"negative_prompt has no effect: {name} has none.")
        elif isinstance(scale, int | float) and scale <= 1:
            found.append(
                f"negative_prompt has no effect at a guidance_scale of 1 or less; it is {scale:g}."
            )
    return tuple(found)
