"""Images in uploads: checked before they are decoded, then read as viewers show them.

They are decoded in threads of their own.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from serve_app.config.limits import LimitsConfig
from serve_app.errors import InvalidRequest
from serve_app.gateway.bounded_file import BoundedFile, TooManyParts
from serve_app.gateway.color_profiles import UnusableProfile, to_srgb
from serve_app.gateway.png_colors import profile_of, profile_of_gamma
from serve_app.gateway.png_files import (
    UnreadableTransparency,
    with_transparent_color,
    without_profile,
)

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

_XMP = ("xmp", "XML:com.adobe.xmp", "Raw profile type xmp")

_NO_MASK = (
    "image is transparent in part, and there is no mask: these parts become white, and the whole "
    "image changes. To change only these parts, send the file as mask, too."
)

Result = TypeVar("Result")


async def in_image_thread(work: Callable[[], Result]) -> Result:
    """Run work on large images in a thread, two at a time."""
    return await asyncio.get_running_loop().run_in_executor(_THREADS, work)


@dataclass(frozen=True)
class InputImage:
    """A decoded image, in sRGB."""

    pixels: Image.Image
    warnings: tuple[str, ...] = ()
    """Parts of the file without effect, such as a color profile that cannot be used."""


MaskReader = Callable[[bytes, LimitsConfig, tuple[int, int]], InputImage]
"""Decodes the mask of an image of (width, height) to white where the image is generated anew."""


def read_image(data: bytes, limits: LimitsConfig, has_mask: bool = False) -> InputImage:
    """Decode an image as viewers show it: turned as its EXIF says, transparent parts on white.

    Args:
        data: content of the file.
        limits: limits of the server.
        has_mask: True if a mask has the part to generate anew.

    Raises:
        InvalidRequest: if it is no such image, or a huge one.
    """
    image, warnings = _decode(data, "image", limits)
    if image.mode == "RGB":
        return InputImage(image, warnings)
    if not has_mask and _is_transparent(image):
        warnings = (*warnings, _NO_MASK)
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return InputImage(white, warnings)


def read_mask(data: bytes, limits: LimitsConfig, size: tuple[int, int]) -> InputImage:
    """Decode a mask: white where the file is transparent, which is the part to generate anew.

    Raises:
        InvalidRequest: if it is no such image, not of this size, or without transparency.
    """
    image, warnings = _decode(data, "mask", limits)
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
    if not _is_transparent(image):
        raise InvalidRequest(
            "mask is opaque everywhere: make the part to generate anew transparent.", "mask"
        )
    return InputImage(ImageOps.invert(image.getchannel("A")), warnings)


def read_white_mask(
    data: bytes, limits: LimitsConfig, size: tuple[int, int], inverted: bool = False
) -> InputImage:
    """Decode a mask whose white part is generated anew.

    In a mask with transparent parts, the opaque part is. A mask of another size is scaled to
    ``size``. ``inverted`` swaps the parts.

    Raises:
        InvalidRequest: if it is no such image, or names no part.
    """
    image, warnings = _decode(data, "mask", limits)
    transparent = image.mode == "RGBA" and _is_transparent(image)
    changed = image.getchannel("A") if transparent else image.convert("L")
    if inverted:
        changed = ImageOps.invert(changed)
    if changed.getextrema() == (0, 0):
        raise InvalidRequest(
            f"mask is {'white' if inverted else 'black'} everywhere: make the part to generate "
            f"anew {'black' if inverted else 'white'}.",
            "mask",
        )
    return InputImage(changed if changed.size == size else changed.resize(size), warnings)


def _is_transparent(image: Image.Image) -> bool:
    least, _ = image.getextrema()[-1]  # type: ignore[misc]
    return least != 255


def _decode(data: bytes, param: str, limits: LimitsConfig) -> tuple[Image.Image, tuple[str, ...]]:
    """Decode to RGBA if any part is transparent, else to RGB. At most two copies exist at once.

    Returns the image in sRGB, and warnings.
    """
    most = limits.max_image_pixels
    try:
        image, profile = _open(data)
        if param == "mask":
            profile = None  # only its transparency is read
        if image.width * image.height > most:
            raise InvalidRequest(
                f"{param} has {image.width}x{image.height} pixels; at most {most} are allowed.",
                param,
            )
        # Photos have further images, which are no frames: previews, depth maps, gain maps.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if image.info.get("default_image"):  # for viewers without animation
            image.seek(1)
            frames -= 1
        image.load()
        for name in _XMP:  # Pillow looks there for an orientation, and viewers do not
            image.info.pop(name, None)
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if image.format == "PNG":
            image = with_transparent_color(image, data)
        turn = _TURNS.get(orientation)
        if turn is not None:
            image = image.transpose(turn)
        image, warnings = _in_srgb(image, profile, param)
        image.info = {}  # comments and EXIF must not reach the generated file
        if frames > 1:
            animated = f"{param} is an animation of {frames} frames; only the first one is read."
            warnings = (*warnings, animated)
        return image, warnings
    except InvalidRequest:
        raise
    except UnreadableTransparency as error:
        raise InvalidRequest(f"{param} cannot be read: {error}.", param) from None
    except TooManyParts:
        raise InvalidRequest(
            f"{param} cannot be read: it has too many parts for its size; save it again.", param
        ) from None
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


def _open(data: bytes) -> tuple[Image.Image, bytes | UnusableProfile | None]:
    """Read the header of an image. Returns its color profile, too, or why it cannot be used."""
    try:
        image = Image.open(BoundedFile(data), formats=FORMATS)
    except TooManyParts:
        raise
    except Exception:
        stripped = without_profile(data)
        if stripped is None:
            raise
        image = Image.open(BoundedFile(stripped), formats=FORMATS)
        image.info["icc_profile"] = None
    # This is the order of the standard of PNG.
    try:
        declared: bytes | UnusableProfile | None = profile_of(data)
    except UnusableProfile as error:
        declared = error
    if declared is None or (isinstance(declared, UnusableProfile) and "icc_profile" in image.info):
        declared = _profile_in(image, data)
    return image, declared


def _profile_in(image: Image.Image, data: bytes) -> bytes | UnusableProfile | None:
    if "icc_profile" in image.info:
        return image.info["icc_profile"] or UnusableProfile("it is broken or incomplete")
    try:
        return profile_of_gamma(data)
    except UnusableProfile as error:
        return error


def _in_srgb(
    image: Image.Image, profile: bytes | UnusableProfile | None, param: str
) -> tuple[Image.Image, tuple[str, ...]]:
    """Convert to RGBA if any part is transparent, else to RGB, and from its profile to sRGB."""
    alpha = "A" if image.has_transparency_data else ""
    if profile is None:
        return image.convert("RGB" + alpha), ()
    if image.mode in ("1", "L", "LA"):
        mode = "L" + alpha
    else:
        mode = "CMYK" if image.mode == "CMYK" else "RGB" + alpha
    if image.mode != mode:
        image = image.convert(mode)
    try:
        if isinstance(profile, UnusableProfile):
            raise profile
        return to_srgb(image, profile), ()
    except UnusableProfile as error:
        warning = (
            f"the color profile of {param} is ignored: {error}. Its colors are read as sRGB; "
            "convert the file to sRGB if they must be exact."
        )
        return image.convert("RGB" + alpha), (warning,)
