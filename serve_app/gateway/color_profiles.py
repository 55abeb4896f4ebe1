"""Color profiles of uploads: colors are converted to sRGB, in which models work."""

import io

from PIL import Image, ImageChops, ImageCms

MAX_PROFILE_BYTES = 4 * 2**20
"""Size of a profile that is still read. Large ones of printers have three million bytes."""

_SPACES = {"RGB": "color", "GRAY": "grey", "CMYK": "CMYK"}
"""Color spaces of profiles that are converted, and the images that they fit."""


class UnusableProfile(Exception):
    """A color profile that is broken, too large, or for other images. The text is the reason."""


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert the colors of an image to sRGB: RGBA if it has an alpha channel, else RGB.

    Alpha is not changed. An image that is in sRGB already, up to rounding, is not changed either.

    Args:
        image: Image in RGB, RGBA, L, LA or CMYK. It may be changed in place.
        profile: ICC profile of the image.

    Raises:
        UnusableProfile: with the reason.
    """
    if len(profile) > MAX_PROFILE_BYTES:
        raise UnusableProfile(
            f"it has {len(profile)} bytes, and at most {MAX_PROFILE_BYTES} are allowed"
        )
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space not in _SPACES:
            raise UnusableProfile(f"its color space is {space!r}, not one of {', '.join(_SPACES)}")
        if space != _space_of(image, space):
            raise UnusableProfile(
                f"it is for {_SPACES[space]} images, and this image has the mode {image.mode}"
            )
        if space == "RGB":
            if image.mode in ("L", "LA"):
                image = image.convert("RGBA" if image.mode == "LA" else "RGB")
            transform = _transform(source, image.mode, image.mode)
            if not _keeps(_transform(source, "RGB", "RGB"), _cube()):
                transform.apply_in_place(image)
            return image
        transform = _transform(source, "L" if space == "GRAY" else "CMYK", "RGB")
        colors = image.getchannel("L") if image.mode == "LA" else image
        if space == "GRAY" and _keeps(transform, Image.linear_gradient("L")):
            return image.convert("RGBA" if image.mode == "LA" else "RGB")
        converted = transform.apply(colors)
        if image.mode == "LA":
            converted.putalpha(image.getchannel("A"))
        return converted
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError) as error:
        raise UnusableProfile(f"it is broken: {error}") from None


def _space_of(image: Image.Image, wanted: str) -> str:
    """Return the color space of an image's pixels. Grey ones can also be read as RGB."""
    if image.mode == "CMYK":
        return "CMYK"
    return "GRAY" if image.mode in ("L", "LA") and wanted == "GRAY" else "RGB"


def _transform(
    source: ImageCms.ImageCmsProfile, mode: str, result: str
) -> ImageCms.ImageCmsTransform:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    return ImageCms.ImageCmsTransform(source, srgb, mode, result, ImageCms.Intent.PERCEPTUAL)


def _keeps(transform: ImageCms.ImageCmsTransform, sample: Image.Image) -> bool:
    """Return whether a transform changes the colors of a sample by rounding only."""
    converted = transform.apply(sample)
    changes = ImageChops.difference(sample.convert("RGB"), converted).getextrema()
    return all(most <= 1 for _, most in changes)  # type: ignore[misc]


def _cube() -> Image.Image:
    """Make an image of colors from all over the RGB cube."""
    shades = bytes(range(0, 256, 15))
    pixels = bytes(part for r in shades for g in shades for b in shades for part in (r, g, b))
    return Image.frombytes("RGB", (len(shades), len(shades) ** 2), pixels)
