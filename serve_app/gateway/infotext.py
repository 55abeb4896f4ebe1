"""The text about an image that tools of AUTOMATIC1111's web UI read, in its format."""

import json

from serve_app import __version__
from serve_app.gateway.sdapi.samplers import AUTOMATIC, sampler_of
from serve_app.protocol.params import GenerationParams


def infotext(params: GenerationParams, size: str, model: str) -> str:
    """Write the parameters of an image: the prompts, and a line of names with values.

    Args:
        params: resolved parameters. Adapters become tags in the prompt.
        size: size of the image, as WIDTHxHEIGHT.
        model: name of the model.
    """
    tags = [f"<lora:{name}:{scale:g}>" for name, scale in params.lora]
    lines = [" ".join([params.prompt, *tags])]
    if params.negative_prompt:
        lines.append(f"Negative prompt: {params.negative_prompt}")
    sampler, spacing = sampler_of(params.noise_scheduler)
    named: dict[str, object] = {"Steps": params.num_inference_steps, "Sampler": sampler}
    if spacing != AUTOMATIC:
        named["Schedule type"] = spacing
    if params.guidance_scale is not None:
        named["CFG scale"] = f"{params.guidance_scale:g}"
    named |= {"Seed": params.seed, "Size": size, "Model": model}
    if params.strength is not None:
        named["Denoising strength"] = f"{params.strength:g}"
    if params.acceleration != "none":
        named["Acceleration"] = params.acceleration
    named["Version"] = f"diffusion-serve {__version__}"
    return "\n".join(
        [*lines, ", ".join(f"{name}: {_quoted(value)}" for name, value in named.items())]
    )


def _quoted(value: object) -> str:
    """Write a value; in quotes if it has a character that ends one."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",:\n") else text
