"""The images of a request: their number, and their place in its parameters."""

from collections.abc import Sequence
from dataclasses import replace

from serve_app.config.limits import LimitsConfig
from serve_app.errors import InvalidRequest
from serve_app.gateway.input_images import MaskReader, read_image
from serve_app.protocol.params import GenerationParams, ModelInfo, shrunk


def check_number(count: int, model: ModelInfo) -> None:
    """Check that the model takes this number of input images.

    Raises:
        InvalidRequest: there are too many, or none for a model that needs one.
    """
    if count == 0 and "text-to-image" not in model.tasks:
        mask = " and a mask" if model.tasks == ("inpainting",) else ""
        raise InvalidRequest(
            f"{model.pipeline} edits images and generates none from a prompt alone. Send the "
            f"request with an image{mask} to /v1/images/edits.",
            "image",
        )
    if count > model.max_input_images:
        raise InvalidRequest(
            f"image: {count} images are given; {model.pipeline} takes at most "
            f"{model.max_input_images} in a request. Send no more.",
            "image",
        )


def with_images(
    params: GenerationParams,
    images: Sequence[bytes],
    mask: bytes | None,
    mask_reader: MaskReader,
    model: ModelInfo,
    limits: LimitsConfig,
) -> tuple[GenerationParams, tuple[str, ...]]:
    """Decode the images and the mask of the first one, and resolve the parameters with them.

    Each further image is reduced before the next one is decoded, which bounds the memory.

    Returns the parameters, and warnings.

    Raises:
        InvalidRequest: a file cannot be read, or the model does not take the request.
    """
    first, *others = images
    decoded = read_image(first, limits, has_mask=mask is not None)
    params, warnings = replace(params, image=decoded.pixels), decoded.warnings
    if mask is not None:
        decoded_mask = mask_reader(mask, limits, decoded.pixels.size)
        params = replace(params, mask_image=decoded_mask.pixels)
        warnings += decoded_mask.warnings
    for other in others:
        more = read_image(other, limits)
        params = replace(params, more_images=(*params.more_images, shrunk(more.pixels, model)))
        warnings += more.warnings
    return params.resolved(model), warnings
