import io

import numpy as np
import pytest
from PIL import Image

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
