"""Pictures as files. Slow next to a denoising step: never call it on the engine's thread."""

import io
from dataclasses import dataclass
from typing import Literal, get_args

from PIL import Image

ImageFormat = Literal["png", "jpeg", "webp"]
IMAGE_FORMATS: tuple[ImageFormat, ...] = get_args(ImageFormat)


@dataclass(frozen=True)
class EncodedImage:
    """A finished picture as it travels from a replica to the gateway."""

    data: bytes
    seed: int
    width: int
    height: int
    warnings: tuple[str, ...] = ()


def encode(image: Image.Image, image_format: ImageFormat) -> bytes:
    """The picture as a file's bytes. PNG is exact; JPEG and WebP are at quality 95."""
    buffer = io.BytesIO()
    if image_format == "png":
        image.save(buffer, "png", compress_level=3)  # twice as fast as the default, 5 % larger
    else:
        image.save(buffer, image_format, quality=95)
    return buffer.getvalue()
