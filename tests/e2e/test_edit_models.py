"""OpenAI's client edits with one image and with two, on a tiny model that takes several."""

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from openai import BadRequestError, OpenAI
from PIL import Image, ImageChops, ImageDraw

from tests.edit_pipelines import KLEIN, flux_2_klein
from tests.serve_process import demo_config, free_port, serving_config

pytestmark = pytest.mark.serve

SIZE_PX = 128, 64


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server of the tiny model."""
    folder = tmp_path_factory.mktemp("flux-2-klein")
    flux_2_klein().save_pretrained(folder, safe_serialization=True)
    config = demo_config(free_port())
    [application] = config["applications"]
    application["args"] = {
        "model": {
            "id": "klein",
            "path": str(folder),
            "device": "cpu",
            "default_size_px": list(SIZE_PX),
            "default_steps": 4,
            "call_kwargs": KLEIN,
        },
        "engine": {"max_batch_size": 4, "limits": {"max_input_images": 2}},
    }
    with serving_config(config) as url:
        yield url


def ring(color: str) -> bytes:
    """Return the file of an image of a ring."""
    image = Image.new("RGB", SIZE_PX, "grey")
    ImageDraw.Draw(image).ellipse((8, 8, 56, 56), outline=color, width=8)
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def test_the_client_edits_with_one_image_and_with_two(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=3)
    [model] = httpx.get(f"{url}/v1/models", timeout=240).json()["data"]
    assert model["batching"] == "on", model["batching_note"]
    assert model["tasks"] == ["text-to-image", "image-to-image"]
    assert model["max_input_images"] == 2

    def edit(colors: tuple[str, ...], seed: int) -> Image.Image:
        files = [(f"{color}.png", ring(color)) for color in colors]
        answer = client.images.edit(
            image=files if len(files) > 1 else files[0],
            prompt="a red circle",
            extra_body={"seed": seed},
        )
        assert answer.data is not None
        data = base64.b64decode(answer.data[0].b64_json or "")
        return Image.open(io.BytesIO(data))

    requests = [(("red",), 1), (("red",), 2), (("red", "blue"), 1), (("red", "green"), 1)]
    alone = [edit(*request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda request: edit(*request), requests))
    for one, other in zip(alone, together, strict=True):
        assert one.size == SIZE_PX
        # An eighth bit of a color may round in the other direction.
        assert int(np.max(ImageChops.difference(one, other))) <= 1
    for index, one in enumerate(alone):
        for other in alone[:index]:
            assert int(np.max(ImageChops.difference(one, other))) > 1
    with pytest.raises(BadRequestError, match=r"3 images are given; .* takes at most 2"):
        edit(("red", "green", "blue"), 1)
