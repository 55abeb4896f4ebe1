"""Properties of a stock pipeline, derived from its signatures and configs, never from its name."""

import contextlib
import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor

from serve_app.engine.model.networks import denoisers_of, networks_of
from serve_app.errors import InvalidRequest, ModelLoadError

_UNLIMITED = 10_000
"""Token limit from which on a tokenizer states none."""

_ROUNDING = 1e-2
"""Distance from the range of pixels that 16-bit types explain."""


def call_parameters(pipeline: DiffusionPipeline) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of the pipeline's ``__call__``, by name."""
    return inspect.signature(type(pipeline).__call__).parameters


def default_argument(pipeline: DiffusionPipeline, name: str) -> object:
    """Return the default of a parameter of ``__call__``; ``None`` if there is no such parameter."""
    parameter = call_parameters(pipeline).get(name)
    return None if parameter is None else parameter.default


def size_multiple(pipeline: DiffusionPipeline) -> int:
    """Return the step in pixels that the stock check accepts: a latent cell times the patch."""
    cell = int(getattr(pipeline, "vae_scale_factor", 8))
    factors = [8, cell]  # the oldest families check for multiples of 8 only
    for denoiser in denoisers_of(pipeline).values():
        patch = getattr(denoiser.config, "patch_size", None)
        patch = patch[-1] if isinstance(patch, list | tuple) else patch
        factors.append(cell * (patch or 1))
    image_processor = getattr(pipeline, "image_processor", None)
    if image_processor is not None:
        factors.append(image_processor.config.vae_scale_factor)
    return _accepted(pipeline, math.lcm(*factors))


def _accepted(pipeline: DiffusionPipeline, multiple: int) -> int:
    """Return the multiple, or the least of its doubles that the pipeline's own check accepts.

    Some families require a number of pixels that follows from nothing else.
    """
    check = getattr(pipeline, "check_inputs", None)
    parameters = {} if check is None else inspect.signature(check).parameters
    if check is None or not {"height", "width"} <= parameters.keys():
        return multiple
    needed: dict[str, Any] = {
        name: None for name, parameter in parameters.items() if parameter.default is parameter.empty
    }
    needed |= {"prompt": "a"} | ({"callback_steps": 1} if "callback_steps" in needed else {})
    for factor in (1, 2, 4, 8, 16):
        side = 3 * factor * multiple  # no multiple of a larger power of two
        with contextlib.suppress(Exception):
            check(**needed | {"height": side, "width": side})
            return factor * multiple
    return multiple  # it needs more arguments


def longest_side(pipeline: DiffusionPipeline) -> int | None:
    """Return the longest side in pixels that the denoisers have positions for, if it is bounded."""
    cell = int(getattr(pipeline, "vae_scale_factor", 8))
    sides: list[int] = []
    denoisers: Mapping[str, Any] = denoisers_of(pipeline)
    for denoiser in denoisers.values():
        embedding: Any = getattr(denoiser, "pos_embed", None)
        if getattr(embedding, "pos_embed_max_size", None) is not None:
            positions: int = embedding.pos_embed.shape[1]
            sides.append(math.isqrt(positions) * denoiser.config.patch_size * cell)
    return min(sides, default=None)


def check_input_images(pipeline: DiffusionPipeline, images: Iterable[Image]) -> None:
    """Check input images as the pipeline's call does, if it has its image processor check them.

    Of a call that fails, nobody knows if the request is at fault. So the check runs before it.

    Raises:
        InvalidRequest: the pipeline takes no image of such a size or shape.
    """
    name = "check_image_input"
    code = getattr(inspect.unwrap(type(pipeline).__call__), "__code__", None)
    check = getattr(getattr(pipeline, "image_processor", None), name, None)
    # Some pipelines have such a processor, and do not have it check.
    if check is None or code is None or name not in code.co_names:
        return
    for image in images:
        try:
            check(image)
        except ValueError as error:
            raise InvalidRequest(
                f"{type(pipeline).__name__} does not take an input image as it is scaled for this "
                f"request, to {image.width}x{image.height} pixels: {error}.",
                "image",
            ) from None


def check_pixels(pipeline: str, pixels: object) -> None:
    """Check that images are a tensor with values from 0 to 1. Waits for the device; NaN passes.

    Raises:
        ModelLoadError: they have another form, which the pipeline converts for Pillow only.
    """
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ModelLoadError(
            f"{pipeline} returns no tensor of images, although it was asked for one, so it cannot "
            "be served. Use a model of another family."
        )
    least, most = float(pixels.min()), float(pixels.max())
    if least < -_ROUNDING or most > 1 + _ROUNDING:
        raise ModelLoadError(
            f"{pipeline} returns pixels from {least:.2g} to {most:.2g}; they must be from 0 to 1. "
            "It converts and checks its images for Pillow only, so it cannot be served. Use a "
            "model of another family."
        )


def check_side_results(pipeline: str, output: object) -> None:
    """Check that an output has nothing beside its images that a response would lack.

    Verdicts of a safety checker are no such thing: `SafetyCheck` reads them.

    Raises:
        ModelLoadError: the pipeline used another prompt than the request's.
    """
    if getattr(output, "revised_prompts", None):
        raise ModelLoadError(
            f"{pipeline} writes each prompt anew, with random numbers that no seed sets: a seed "
            "would not give the same image again. Set use_pe in model.call_kwargs to false, and "
            "let clients write the whole prompt."
        )


def default_size(pipeline: DiffusionPipeline) -> tuple[int, int]:
    """Return the pipeline's own default (width, height) in pixels."""
    width, height = default_argument(pipeline, "width"), default_argument(pipeline, "height")
    if isinstance(width, int) and isinstance(height, int):
        return width, height
    denoiser = next(iter(denoisers_of(pipeline).values()))
    cells = getattr(pipeline, "default_sample_size", None) or getattr(
        denoiser.config, "sample_size", None
    )
    cell = int(getattr(pipeline, "vae_scale_factor", 8))
    if isinstance(cells, list | tuple):
        return int(cells[-1]) * cell, int(cells[-2]) * cell
    side = int(cells) * cell if cells else 1024
    return side, side


def default_steps(pipeline: DiffusionPipeline) -> int:
    """Return the pipeline's own default number of steps, or 50 if it has none."""
    steps = default_argument(pipeline, "num_inference_steps")
    return steps if isinstance(steps, int) else 50


def guided_by_true_cfg(pipeline: DiffusionPipeline) -> bool:
    """Return True if ``true_cfg_scale`` sets classifier-free guidance.

    Families with this parameter apply it only together with a negative prompt. Their
    ``guidance_scale`` belongs to a guidance that may be distilled into the denoiser.
    """
    return "true_cfg_scale" in call_parameters(pipeline) and not any(
        getattr(denoiser.config, "guidance_embeds", False)
        for denoiser in denoisers_of(pipeline).values()
    )


def _reads_guidance(pipeline: DiffusionPipeline) -> bool:
    """Return True if the guidance is an input of the denoiser, as in latent consistency models."""
    return any(
        getattr(denoiser.config, "time_cond_proj_dim", None) is not None
        for denoiser in denoisers_of(pipeline).values()
    )


def takes_negative_prompt(pipeline: DiffusionPipeline, call_kwargs: Mapping[str, Any]) -> bool:
    """Return True if a negative prompt changes the image."""
    parameters = call_parameters(pipeline)
    if "negative_prompt" not in parameters or _reads_guidance(pipeline):
        return False
    if "true_cfg_scale" not in parameters or guided_by_true_cfg(pipeline):
        return True
    scale = call_kwargs.get("true_cfg_scale", default_argument(pipeline, "true_cfg_scale"))
    return isinstance(scale, int | float) and scale > 1


def stateful_components(pipeline: DiffusionPipeline) -> list[str]:
    """Return the names of the components that may hold state of a call.

    Networks hold none, and neither do tokenizers and the like.
    """
    networks = networks_of(pipeline)
    return [
        name
        for name, component in pipeline.components.items()
        if component is not None
        and name not in networks
        and not type(component).__module__.startswith("transformers.")
    ]


def longest_tokenizer(
    pipeline: DiffusionPipeline, call_kwargs: Mapping[str, Any]
) -> tuple[Any, int]:
    """Return the tokenizer that reads most of a prompt, and its limit in tokens.

    Returns (None, 0) if no limit is known.
    """
    sequence = call_kwargs.get(
        "max_sequence_length", default_argument(pipeline, "max_sequence_length")
    )
    longest = sequence if isinstance(sequence, int) else _UNLIMITED
    limits = [
        (min(component.model_max_length, longest), name)
        for name, component in pipeline.components.items()
        if hasattr(component, "model_max_length")
    ]
    limit, name = max(limits, default=(0, ""))
    return (pipeline.components[name], limit) if 0 < limit < _UNLIMITED else (None, 0)
