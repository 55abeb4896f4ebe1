"""Models that need an image, or take several: what reaches the engine, and what is a 400."""

import io
from dataclasses import replace
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.fakes.backend import INFO, FakeBackend
from tests.gateway.conftest import error_of, post
from tests.gateway.test_edits import file_of, halves, mask_of
from tests.gateway.test_json_edits import MASK, reference

pytestmark = pytest.mark.anyio

PATH = "/v1/images/edits"

EDITS = replace(
    INFO,
    pipeline="EditPipeline",
    tasks=("image-to-image",),
    max_input_images=3,
    default_strengths={},
)
FILL = replace(
    INFO,
    pipeline="FillPipeline",
    tasks=("inpainting",),
    default_strengths={"inpainting": 1.0},
)


def wide() -> bytes:
    """Return the file of an image with more pixels than the model's default size."""
    file = io.BytesIO()
    Image.new("RGB", (400, 100), "blue").save(file, "png")
    return file.getvalue()


def parts(*files: bytes, **others: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    images = [("image[]", ("a.png", file)) for file in files]
    return [*images, *((name, ("b.png", file)) for name, file in others.items())]


async def edit(client: httpx.AsyncClient, files: Any, **fields: str) -> httpx.Response:
    return await client.post(PATH, data={"prompt": "x"} | fields, files=files)


async def test_several_images_reach_the_engine_in_their_order(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.info = EDITS
    by_form = await edit(client, parts(file_of(halves()), wide()))
    images = [reference(file_of(halves())), reference(wide())]
    by_json = await client.post(PATH, json={"prompt": "x", "images": images})
    for response, params in zip((by_form, by_json), backend.received, strict=True):
        assert response.status_code == 200, response.text
        assert params.image is not None
        assert params.image.size == (params.width, params.height) == (64, 64)
        [more] = params.more_images
        # As many pixels as the model's default size at most, in its own shape.
        assert more.size == (128, 32)
        assert more.getpixel((0, 0)) == (0, 0, 255)
        usage = response.json()["usage"]
        assert usage["input_tokens_details"]["image_tokens"] == 2 * 16


async def test_usage_counts_each_input_image_at_its_own_size(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.info = EDITS
    files = parts(file_of(halves()), file_of(halves((32, 32))), wide())
    response = await edit(client, files, size="128x64", n="2")
    usage = response.json()["usage"]
    assert usage["input_tokens_details"]["image_tokens"] == 2 * (8 * 4 + 2 * 2 + 8 * 2)
    assert usage["output_tokens"] == 2 * 8 * 4


async def test_the_description_tells_what_a_model_takes(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.info = EDITS
    [model] = (await client.get("/v1/models")).json()["data"]
    assert model["tasks"] == ["image-to-image"]
    assert model["max_input_images"] == 3


async def test_more_images_than_the_model_takes_are_rejected(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.info = EDITS
    files = parts(*[file_of(halves())] * 4)
    message = error_of(await edit(client, files), 400)["message"]
    assert "4 images are given; EditPipeline takes at most 3" in message
    assert backend.received == []


async def test_a_mask_takes_one_image(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.info = replace(EDITS, tasks=("image-to-image", "inpainting"))
    files = parts(file_of(halves()), wide(), mask=file_of(mask_of()))
    message = error_of(await edit(client, files), 400)["message"]
    assert "takes at most 1 in a request with a mask" in message


async def test_images_are_counted_before_they_are_decoded(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.info = EDITS
    broken = b"no image"
    for files, tasks, reason in (
        (parts(*[broken] * 4), EDITS.tasks, "at most 3 in a request."),
        (parts(broken, broken, mask=broken), ("image-to-image", "inpainting"), "with a mask."),
        (parts(broken, mask=broken), EDITS.tasks, "does not support inpainting"),
        (parts(broken), ("inpainting",), "send a mask, too"),
        (parts(broken), EDITS.tasks, "cannot be read"),
    ):
        backend.info = replace(EDITS, tasks=tasks)
        assert reason in error_of(await edit(client, files), 400)["message"]


async def test_a_prompt_alone_is_sent_to_the_other_route(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    for info, needed in ((EDITS, "an image"), (FILL, "an image and a mask")):
        backend.info = info
        error = error_of(await post(client, {"prompt": "x"}), 400)
        assert f"Send the request with {needed} to /v1/images/edits" in error["message"]
        assert error["param"] == "image"


async def test_an_inpainting_model_needs_a_mask(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.info = FILL
    message = error_of(await edit(client, parts(file_of(halves()))), 400)["message"]
    assert "changes the part of an image that a mask marks; send a mask" in message
    files = parts(file_of(halves()), mask=file_of(mask_of()))
    response = await edit(client, files, strength="0.5")
    assert response.status_code == 200, response.text


async def test_fields_that_the_model_does_not_take_are_rejected(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.info = EDITS
    image = reference(file_of(halves()))
    for fields, reason in (
        ({"strength": 0.5}, "does not support strength"),
        ({"mask": MASK}, "does not support inpainting"),
    ):
        body = {"prompt": "x", "images": [image]} | fields
        assert reason in error_of(await client.post(PATH, json=body), 400)["message"]
