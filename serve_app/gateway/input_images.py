"""Images in uploads: checked before they are decoded, then read as viewers show them.

They are decoded in threads of their own.
"""

import asyncio
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from serve_app.config.models import LimitsConfig
from serve_app.errors import InvalidRequest
from serve_app.gateway.color_profiles import UnusableProfile, to_srgb, without_png_profile

FORMATS = ("PNG", "JPEG", "WEBP")

_THREADS = ThreadPoolExecutor(2, "images")
"""A decoded image may be a hundred times as large as its file, so only two are decoded at once."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transpositions by EXIF orientation. Pillow's exif_transpose also rewrites the rest of EXIF, and
fails where that is malformed."""

Result = TypeVar("Result")


async def in_image_thread(work: Callable[[], Result]) -> Result:
    """Run work on large images in a thread, two at a time."""
    return await asyncio.get_running_loop().run_in_executor(_THREADS, work)


@dataclass(frozen=True)
class InputImage:
    """A decoded image, in sRGB."""

    pixels: Image.Image
    warnings: tuple[str, ...] = ()
    """Parts of the file without effect: a color profile that cannot be used."""


def read_image(data: bytes, limits: LimitsConfig) -> InputImage:
    """Decode an image as viewers show it: turned as its EXIF says, transparent parts on white.

    Raises:
        InvalidRequest: if it is no such image, or a huge one.
    """
    image, warnings = _decode(data, "image", limits)
    if image.mode == "RGB":
        return InputImage(image, warnings)
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return InputImage(white, warnings)


def read_mask(data: bytes, limits: LimitsConfig, size: tuple[int, int]) -> Image.Image:
    """Decode a mask: white where the file is transparent, which is the part to generate anew.

    Raises:
        InvalidRequest: if it is no such image, not of this size, or without transparency.
    """
    image, _ = _decode(data, "mask", limits)  # only its transparency is read
    if image.size != size:
        raise InvalidRequest(
            f"mask has {image.width}x{image.height} pixels and image {size[0]}x{size[1]}: both "
            "must have the same size.",
            "mask",
        )
    if image.mode == "RGB":
        raise InvalidRequest(
            "mask has no transparency: make the part to generate anew transparent.", "mask"
        )
    opaque = image.getchannel("A")
    if opaque.getextrema()[0] == 255:
        raise InvalidRequest(
            "mask is opaque everywhere: make the part to generate anew transparent.", "mask"
        )
    return ImageOps.invert(opaque)


def _decode(data: bytes, param: str, limits: LimitsConfig) -> tuple[Image.Image, tuple[str, ...]]:
    """Decode to RGBA if any part is transparent, else to RGB. At most two copies exist at once.

    Returns the image in sRGB, and warnings.
    """
    most = limits.max_image_pixels
    try:
        image = _open(data)
        if image.width * image.height > most:
            raise InvalidRequest(
                f"{param} has {image.width}x{image.height} pixels; at most {most} are allowed.",
                param,
            )
        image.load()
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        if turn is not None:
            image = image.transpose(turn)
        if image.mode == "I;16":  # Pillow would clip values over 255 to white
            image = image.point(lambda value: value * (1 / 256)).convert("L")
            image.info.pop("transparency", None)  # a grey of 16 bits
        return _in_srgb(image, param)
    except InvalidRequest:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InvalidRequest(
            f"{param} has too many pixels; at most {most} are allowed.", param
        ) from None
    except Exception as error:  # noqa: BLE001  what Pillow raises of broken files is listed nowhere
        # For data that is no image at all, Pillow's message is only a memory address.
        reason = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        raise InvalidRequest(
            f"{param} cannot be read as one of {', '.join(FORMATS)}{reason}.", param
        ) from None


def _open(data: bytes) -> Image.Image:
    """Read the header of an image. Its ``info`` has ``None`` for a profile that cannot be read."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:
        stripped = without_png_profile(data)
        if stripped is None:
            raise
    image = Image.open(io.BytesIO(stripped), formats=FORMATS)
    image.info["icc_profile"] = None
    return image


def _in_srgb(image: Image.Image, param: str) -> tuple[Image.Image, tuple[str, ...]]:
    """Convert to RGBA if any part is transparent, else to RGB, and from its profile to sRGB."""
    has_profile = "icc_profile" in image.info
    profile = image.info.pop("icc_profile", None)
    alpha = "A" if image.has_transparency_data else ""
    if has_profile:
        if image.mode in ("1", "L", "LA"):
            mode = "L" + alpha
        else:
            mode = "CMYK" if image.mode == "CMYK" else "RGB" + alpha
        if image.mode != mode:
            image = image.convert(mode)
        try:
            if profile is None:
                raise UnusableProfile("it is broken or incomplete")
            converted = to_srgb(image, profile)
            converted.info.pop("icc_profile", None)  # Pillow sets that of sRGB
            return converted, ()
        except UnusableProfile as error:
            warning = (
                f"the color profile of {param} is ignored: {error}. Its colors are read as sRGB; "
                "convert the file to sRGB if they must be exact."
            )
            return image.convert("RGB" + alpha), (warning,)
    return image.convert("RGB" + alpha), ()
