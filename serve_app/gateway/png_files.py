"""Parts of PNG files that Pillow reads wrongly, or for which it rejects the whole file."""

import struct
from collections.abc import Iterator

from PIL import Image, ImageChops

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class UnreadableTransparency(Exception):
    """A transparent color that cannot be told from others. The text is the reason."""


def chunks_before_pixels(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind, start and end of each chunk before the pixels; none of another file."""
    if not data.startswith(_SIGNATURE):
        return
    start = len(_SIGNATURE)
    while start + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        if kind == b"IDAT":
            return
        end = start + 12 + length
        yield kind, start, end
        start = end


def without_profile(data: bytes) -> bytes | None:
    """Return a PNG file without its color profile; ``None`` if it has none, or is no PNG file.

    Pillow rejects the whole file if the chunk with the profile is broken.
    """
    for kind, start, end in chunks_before_pixels(data):
        if kind == b"iCCP":
            return data[:start] + data[end:]
    return None


def with_transparent_color(image: Image.Image, data: bytes) -> Image.Image:
    """Return the image of a PNG file with its transparent color as Pillow would need it.

    The file states the color in the depth of its pixels. Pillow compares it with pixels of 8 bits.

    Raises:
        UnreadableTransparency: the color has 16 bits per channel, of which Pillow keeps 8.
    """
    depth = next((data[start + 16] for _, start, _ in chunks_before_pixels(data)), 8)
    color = image.info.get("transparency")
    if image.mode == "I;16":
        return _grey_of_16_bits(image, color)
    if color is None:
        return image
    if depth == 16:
        raise UnreadableTransparency(
            "it has 16 bits per channel and a transparent color; save it with an alpha channel or "
            "with 8 bits"
        )
    if image.mode == "L" and isinstance(color, int):
        image.info["transparency"] = color * 255 // (2**depth - 1)
    return image


def _grey_of_16_bits(image: Image.Image, transparent: int | None) -> Image.Image:
    """Keep the upper byte of each pixel: Pillow would clip values over 255 to white."""
    values = image.tobytes()
    upper = Image.frombytes("L", image.size, values[1::2])
    if transparent is None:
        return upper
    lower = Image.frombytes("L", image.size, values[0::2])
    differs = [
        part.point([0 if value == wanted else 255 for value in range(256)])
        for part, wanted in zip((upper, lower), divmod(transparent, 256), strict=True)
    ]
    return Image.merge("LA", (upper, ImageChops.lighter(*differs)))
