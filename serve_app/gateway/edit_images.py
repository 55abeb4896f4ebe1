"""The images of a request: their number, and their place in its parameters."""

import functools
from collections.abc import Sequence
from dataclasses import replace

from PIL.Image import Image

from serve_app.config.limits import LimitsConfig
from serve_app.errors import InvalidRequest
from serve_app.gateway.input_images import MaskReader, in_image_thread, read_image
from serve_app.protocol.params import GenerationParams, ModelInfo, shrunk


def check_number(count: int, has_mask: bool, model: ModelInfo) -> None:
    """Check that the model takes this number of input images, before they are decoded.

    Raises:
        InvalidRequest: there are too many, or none for a model that needs one.
    """
    if count:
        model.check_images(count, has_mask)
    elif "text-to-image" not in model.tasks:
        mask = " and a mask" if model.tasks == ("inpainting",) else ""
        raise InvalidRequest(
            f"{model.pipeline} edits images and generates none from a prompt alone. Send the "
            f"request with an image{mask} to /v1/images/edits.",
            "image",
        )


async def with_images(
    params: GenerationParams,
    images: Sequence[bytes],
    mask: bytes | None,
    mask_reader: MaskReader,
    model: ModelInfo,
    limits: LimitsConfig,
) -> tuple[GenerationParams, tuple[str, ...]]:
    """Decode the images and the mask of the first one, and resolve the parameters with them.

    Each image is a task of its own: requests take turns, and a cancelled one decodes no more of
    them. A request holds only reduced images while it waits, so the first one is decoded last.

    Returns the parameters, and warnings.

    Raises:
        InvalidRequest: a file cannot be read, or the model does not take the request.
    """
    first, *others = images
    more: tuple[Image, ...] = ()
    warnings: tuple[str, ...] = ()
    for other in others:
        one, given = await in_image_thread(functools.partial(_read_reduced, other, model, limits))
        more, warnings = (*more, one), (*warnings, *given)

    def resolve() -> tuple[GenerationParams, tuple[str, ...]]:
        decoded = read_image(first, limits, has_mask=mask is not None)
        given = decoded.warnings
        mask_image: Image | None = None
        if mask is not None:
            decoded_mask = mask_reader(mask, limits, decoded.pixels.size)
            mask_image, given = decoded_mask.pixels, (*given, *decoded_mask.warnings)
        complete = replace(params, image=decoded.pixels, more_images=more, mask_image=mask_image)
        return complete.resolved(model), (*given, *warnings)

    return await in_image_thread(resolve)


def _read_reduced(
    data: bytes, model: ModelInfo, limits: LimitsConfig
) -> tuple[Image, tuple[str, ...]]:
    """Decode a further image, and reduce it."""
    decoded = read_image(data, limits)
    return shrunk(decoded.pixels, model), decoded.warnings
