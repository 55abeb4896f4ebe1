"""Input images in the mode and the size that a request has."""

import math

from PIL import ImageOps
from PIL.Image import Image

from serve_app.config.limits import LimitsConfig
from serve_app.errors import InvalidRequest


def fitted(image: Image, mode: str, size: tuple[int, int]) -> Image:
    """Convert to a mode and a size, ``(width, height)``: scaled, and cropped around the middle."""
    if image.mode != mode:
        image = image.convert(mode)
    return image if image.size == size else ImageOps.fit(image, size)


def near(
    size: tuple[int, int], native: tuple[int, int], multiple: int, limits: LimitsConfig
) -> tuple[int, int]:
    """Round ``size`` to multiples, and shrink it where it has more pixels than ``native``.

    The longer side of extreme shapes is cut, so that the shorter one is still a multiple.
    """
    most = min(math.prod(native), limits.max_pixels)
    longest = min(limits.max_side_px, most // multiple) // multiple
    scale = min(1.0, math.sqrt(most / math.prod(size)))
    cells = [side * scale / multiple for side in size]
    if math.prod(round(cell) * multiple for cell in cells) > most:
        cells = [math.floor(cell) for cell in cells]
    width, height = (min(max(1, round(cell)), longest) * multiple for cell in cells)
    return width, height


def fitted_input(image: Image, mode: str, size: tuple[int, int], param: str) -> Image:
    """Convert an input image as `fitted` does.

    Raises:
        InvalidRequest: it cannot be read; ``param`` names it.
    """
    try:
        return fitted(image, mode, size)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's errors for broken files
        raise InvalidRequest(f"{param} cannot be read: {error}", param) from None
