import io

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageDraw

from serve_app.protocol.images import IMAGE_FORMATS, Encoding, ImageFormat
from tools.demo_model.scenes import Scene, SceneObject, render

PIXELS = render(Scene("white", (SceneObject("star", "red", 0.5, 0.5, 0.3),)), 96, 64)


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_encoded_images_can_be_decoded(image_format: ImageFormat) -> None:
    with Image.open(io.BytesIO(Encoding(image_format).encode(Image.fromarray(PIXELS)))) as image:
        assert image.format == image_format.upper()
        decoded = np.asarray(image.convert("RGB")).astype(int)
    assert decoded.shape == PIXELS.shape
    difference = np.abs(decoded - PIXELS).mean()
    assert difference == 0 if image_format == "png" else difference < 6


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_less_quality_makes_smaller_files(image_format: ImageFormat) -> None:
    sizes = [
        len(Encoding(image_format, quality).encode(Image.fromarray(PIXELS)))
        for quality in (0, 50, 100)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]


def _loss(encoding: Encoding, image: Image.Image) -> int:
    """Return the largest difference of a pixel that the file makes."""
    with Image.open(io.BytesIO(encoding.encode(image))) as decoded:
        difference = ImageChops.difference(decoded.convert("RGB"), image)
    return max(most for _, most in difference.getextrema())  # type: ignore[misc]


def test_jpeg_keeps_the_edges_of_colors() -> None:
    """With colors at half of the resolution, an edge of red on blue is off by 160 of 255."""
    image = Image.new("RGB", (64, 64), "blue")
    ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill="red")
    assert _loss(Encoding("jpeg"), image) < 30
    assert _loss(Encoding("jpeg", 100), image) < 5
    assert len(Encoding("jpeg", 80).encode(image)) < len(Encoding("jpeg", 90).encode(image)) * 0.7


def test_files_have_no_profile_and_no_metadata() -> None:
    """Without a profile, viewers read sRGB."""
    for image_format in IMAGE_FORMATS:
        with Image.open(io.BytesIO(Encoding(image_format).encode(Image.fromarray(PIXELS)))) as file:
            assert not {"icc_profile", "exif", "xmp", "comment", "gamma"} & file.info.keys()
