"""Pictures that clients send: looked at before they are decoded, in threads of their own."""

import asyncio
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from serve_app.config import LimitsConfig
from serve_app.errors import InvalidRequest

FORMATS = ("PNG", "JPEG", "WEBP")

_THREADS = ThreadPoolExecutor(2, "pictures")
"""A decoded picture may be a hundred times its file: few at a time."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF's orientation. Pillow's exif_transpose also writes the rest of EXIF anew, and fails where
that is malformed."""

Result = TypeVar("Result")


async def apart(work: Callable[[], Result]) -> Result:
    """Run work on large pictures in a thread, two at a time."""
    return await asyncio.get_running_loop().run_in_executor(_THREADS, work)


def read_image(data: bytes, limits: LimitsConfig) -> Image.Image:
    """The picture as one would see it: turned as its EXIF says, transparent parts on white.

    Raises:
        InvalidRequest: if it is no such picture, or a huge one.
    """
    image = _decode(data, "image", limits)
    if image.mode == "RGB":
        return image
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def read_mask(data: bytes, limits: LimitsConfig, size: tuple[int, int]) -> Image.Image:
    """White where the mask is transparent, which is what shall be painted anew.

    Raises:
        InvalidRequest: if it is no such picture, not of this size, or without transparency.
    """
    image = _decode(data, "mask", limits)
    if image.size != size:
        raise InvalidRequest(
            f"mask has {image.width}x{image.height} pixels and image {size[0]}x{size[1]}: both "
            "must have the same size.",
            "mask",
        )
    if image.mode == "RGB":
        raise InvalidRequest(
            "mask has no transparency: make transparent what shall be painted anew.", "mask"
        )
    opaque = image.getchannel("A")
    if opaque.getextrema()[0] == 255:
        raise InvalidRequest("mask is opaque everywhere: there is nothing to paint anew.", "mask")
    return ImageOps.invert(opaque)


def _decode(data: bytes, param: str, limits: LimitsConfig) -> Image.Image:
    """In RGBA if anything of it is transparent, else in RGB; never more than two copies at once."""
    most = limits.max_image_pixels
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > most:
            raise InvalidRequest(
                f"{param} has {image.width}x{image.height} pixels; at most {most} are allowed.",
                param,
            )
        image.load()
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        if turn is not None:
            image = image.transpose(turn)
        if image.mode == "I;16":  # Pillow would clip what is over 255 to white
            image = image.point(lambda value: value * (1 / 256)).convert("L")
            image.info.pop("transparency", None)  # a grey of 16 bits
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    except InvalidRequest:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InvalidRequest(
            f"{param} has too many pixels; at most {most} are allowed.", param
        ) from None
    except Exception as error:  # noqa: BLE001  what Pillow raises of broken files is listed nowhere
        # Of what is no picture at all, Pillow only tells where in memory it is.
        reason = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        raise InvalidRequest(
            f"{param} cannot be read as one of {', '.join(FORMATS)}{reason}.", param
        ) from None
