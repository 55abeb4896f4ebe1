"""Edits with a mask, from the upload to the answer: what must stay comes back exactly."""

import base64
import io
import json

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from serve_app.config.models import AppConfig
from serve_app.engine.engine import Engine
from serve_app.gateway.auth import KeyRing
from serve_app.gateway.routes import create_api
from serve_app.protocol.images import IMAGE_FORMATS, Encoding, ImageFormat
from serve_app.protocol.inpainting import feather_px
from tests.conftest import DEMO
from tests.deployments.test_generator import Replica

pytestmark = pytest.mark.anyio

SIZE = (64, 64)
EDGE = 32
"""First column that is kept."""
KEPT_FROM = EDGE + feather_px(SIZE)


def upload(size: tuple[int, int]) -> Image.Image:
    """Make an image with fine details, which a VAE cannot keep."""
    noise = Image.effect_noise(size, 60)
    return Image.merge("RGB", (noise, noise.rotate(180), ImageOps.invert(noise)))


def file_of(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


async def edit(engine: Engine, image: Image.Image, **fields: str) -> httpx.Response:
    """Generate the left half anew, at `SIZE`."""
    mask = Image.new("RGBA", image.size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, image.width // 2, image.height))
    api = create_api(AppConfig(model=DEMO), Replica(engine), KeyRing(None, None))
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.post(
            "/v1/images/edits",
            data={"prompt": "a red circle on blue", "seed": "1", "num_inference_steps": "6"}
            | {"size": "64x64", "strength": "1"}
            | fields,
            files={"image": ("a.png", file_of(image)), "mask": ("b.png", file_of(mask))},
        )
    assert response.status_code == 200, response.text
    return response


def pixels(image: Image.Image | str) -> NDArray[np.int64]:
    """Return the pixels of an image, or of a file in base64."""
    if isinstance(image, str):
        image = Image.open(io.BytesIO(base64.b64decode(image)))
    return np.asarray(image.convert("RGB")).astype(np.int64)


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
@pytest.mark.parametrize("size", [SIZE, (200, 100)], ids=["as it is", "scaled and cropped"])
async def test_kept_pixels_are_those_of_the_upload(
    demo_engine: Engine, size: tuple[int, int], image_format: ImageFormat
) -> None:
    image = upload(size)
    fitted = ImageOps.fit(image, SIZE)
    options = {} if image_format == "png" else {"output_compression": "100"}
    response = await edit(demo_engine, image, output_format=image_format, **options)
    before, after = pixels(fitted), pixels(response.json()["data"][0]["b64_json"])
    differences = np.abs(after - before)
    file = Encoding(image_format, quality=100).encode(fitted)
    loss = np.abs(pixels(base64.b64encode(file).decode()) - before)[:, KEPT_FROM:].mean()
    kept = differences[:, KEPT_FROM:]
    if image_format == "png":
        assert kept.max() == 0
    assert kept.mean() <= 1.1 * loss, "no more than the loss of the format"
    assert differences[:, : EDGE - 4].mean() > 30, "the other part is generated anew"


async def test_previews_and_the_streamed_image_keep_them_too(demo_engine: Engine) -> None:
    image = upload(SIZE)
    response = await edit(demo_engine, image, stream="true", partial_images="2")
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line[:6] == "data: "]
    assert [event["type"] for event in events] == [
        "image_edit.partial_image",
        "image_edit.partial_image",
        "image_edit.completed",
    ]
    for event in events:
        after = pixels(event["b64_json"])
        assert (after == pixels(image))[:, KEPT_FROM:].all()
        assert np.abs(after - pixels(image))[:, : EDGE - 4].mean() > 30
