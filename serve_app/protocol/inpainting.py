"""The part of an input image that a mask keeps: laid over the generated image, pixel by pixel.

A pipeline returns that part too, but through the encoder and the decoder of its VAE, which change
it. The seam is hidden in the kept part, where both images show the same.
"""

from PIL import ImageChops, ImageFilter
from PIL.Image import Image, composite

from serve_app.protocol.fitting import fitted
from serve_app.protocol.params import GenerationParams

_CHANGED = 128
"""Least value of a mask's pixel that pipelines generate anew."""


def feather_px(size: tuple[int, int]) -> int:
    """Return the width of the seam: kept pixels at this distance from the mask are exact."""
    return 2 * _radius_px(size)


def with_kept_part(generated: Image, params: GenerationParams) -> Image:
    """Lay the kept part of the input image over a generated one, with a soft edge.

    Kept pixels further than `feather_px` from the changed part are those of the input image,
    scaled and cropped. White pixels of the mask are as generated. Images of other tasks are
    returned as they are.
    """
    if params.image is None or params.mask_image is None:
        return generated
    kept = fitted(params.image, "RGB", generated.size)
    mask = fitted(params.mask_image, "L", generated.size)
    return composite(generated, kept, _feathered(mask))


def _radius_px(size: tuple[int, int]) -> int:
    return max(1, min(8, min(size) // 256))


def _feathered(mask: Image) -> Image:
    """Grow the changed part by the radius, and blur the edge by it too.

    So nothing of the changed part is lost, however thin it is. A soft mask keeps its own values.
    """
    blur = ImageFilter.BoxBlur(_radius_px(mask.size))
    changed = mask.point([0] * _CHANGED + [255] * (256 - _CHANGED))
    grown = changed.filter(blur).point([0] + [255] * 255)
    return ImageChops.lighter(mask, grown.filter(blur))
