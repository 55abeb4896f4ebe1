"""Edits in JSON, whose images are data URLs, and several input images."""

import base64
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from serve_app.gateway.auth import KeyRing
from serve_app.gateway.routes import create_api
from serve_app.protocol.params import ModelInfo
from tests.fakes.backend import CONFIG, INFO, FakeBackend
from tests.gateway.conftest import error_of
from tests.gateway.test_edits import file_of, halves, mask_of, png_that_claims
from tests.gateway.test_other_clients import client_with, warnings_of

pytestmark = pytest.mark.anyio

PATH = "/v1/images/edits"


def reference(data: bytes, kind: str = "image/png") -> dict[str, Any]:
    return {"image_url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}


IMAGE = reference(file_of(halves()))
MASK = reference(file_of(mask_of()))


async def edit(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post(PATH, json={"prompt": "x", "images": [IMAGE]} | fields)


async def test_a_body_in_json_edits_as_a_form_does(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    fields = {"prompt": "x", "seed": 3, "strength": 0.5, "n": 2, "lora": {"ink": 0.5}}
    files = {"image": ("a.png", file_of(halves())), "mask": ("b.png", file_of(mask_of()))}
    texts = fields | {"lora": json.dumps(fields["lora"])}
    by_form = await client.post(PATH, data=texts, files=files)
    by_json = await client.post(PATH, json=fields | {"images": [IMAGE], "mask": MASK})
    answers = [response.json() | {"timings": None, "created": 0} for response in (by_form, by_json)]
    assert answers[0] == answers[1]
    assert by_json.status_code == 200, by_json.text
    described = [replace(params, image=None, mask_image=None) for params in backend.received]
    assert described[:2] == described[2:]
    for params in backend.received:
        assert params.image is not None
        assert params.mask_image is not None
        assert params.image.tobytes() == halves().tobytes()
        assert params.mask_image.getpixel((8, 32)) == 255


async def test_an_edit_in_json_streams(client: httpx.AsyncClient) -> None:
    response = await edit(client, stream=True, partial_images=1)
    names = [line[7:] for line in response.text.splitlines() if line.startswith("event: ")]
    assert names == ["image_edit.partial_image", "image_edit.completed"]


@pytest.mark.parametrize(
    "image",
    [
        reference(file_of(halves(), "jpeg"), "image/jpeg"),
        reference(file_of(halves(), "webp"), "image/png"),  # the file itself says what it is
        {"image_url": IMAGE["image_url"].replace("data:image/png;base64", "DATA:;BASE64")},
        IMAGE | {"file_id": None},
    ],
)
async def test_data_urls_of_all_kinds_are_read(
    client: httpx.AsyncClient, backend: FakeBackend, image: dict[str, Any]
) -> None:
    response = await edit(client, images=[image], mask=None)
    assert response.status_code == 200, response.text
    read = backend.received[0].image
    assert read is not None
    left, right = read.getpixel((8, 32)), read.getpixel((56, 32))
    assert left[0] > 200 > right[0]  # type: ignore[index, operator]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"images": None}, "images", "required"),
        ({"images": []}, "images", "at least 1"),
        ({"images": [IMAGE] * 17}, "images", "at most 16"),
        ({"images": IMAGE}, "images", "array"),
        ({"images": [IMAGE["image_url"]]}, "images.0", "must be a JSON object"),
        ({"images": [{}]}, "images.0.image_url", "required"),
        ({"images": [IMAGE, {"image_url": 5}]}, "images.1.image_url", "string"),
        ({"images": [{"file_id": "file-1"}]}, "file_id", "stores no files"),
        ({"images": [IMAGE | {"detail": "high"}]}, "images.0.detail", "unknown field"),
        ({"images": [{"image_url": "https://a.example/b.png"}]}, "images.0.image_url", "data URL"),
        ({"images": [{"image_url": "file:///etc/passwd"}]}, "images.0.image_url", "data URL"),
        ({"images": [{"image_url": "data:image/png,x"}]}, "images.0.image_url", "data URL"),
        ({"images": [{"image_url": "data:;base64,é"}]}, "images.0.image_url", "base64"),
        ({"images": [{"image_url": "data:;base64,QQ=A"}]}, "images.0.image_url", "base64"),
        ({"images": [{"image_url": "data:;base64,"}]}, "image", "cannot be read"),
        ({"images": [reference(png_that_claims(9000, 9000))]}, "image", "at most 1000000"),
        ({"mask": {"file_id": "file-1"}}, "file_id", "stores no files"),
        ({"mask": {"image_url": None}}, "mask.image_url", "required"),
        ({"mask": {"image_url": "https://a.example/b.png"}}, "mask.image_url", "data URL"),
        ({"mask": IMAGE}, "mask", "no transparency"),
        ({"image": IMAGE["image_url"]}, "image", "unknown field"),
        ({"markup": MASK}, "markup", "use mask"),
        ({"n": "2"}, "n", "integer"),
        ({"lora": {"ink": "1"}}, "lora.ink", "number"),
        ({"cfg_scale": 7}, "cfg_scale", "unknown field"),
    ],
)
async def test_a_wrong_body_in_json_is_rejected_by_field(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    fields: dict[str, Any],
    param: str,
    message: str,
) -> None:
    error = error_of(await edit(client, **fields), 400)
    assert (error["param"], message in error["message"]) == (param, True), error
    assert len(error["message"]) < 1_000  # without the image
    assert backend.received == []


async def test_an_edit_in_json_is_json_of_the_size_of_uploads(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json"}
    for content in (b"{", b"[]", b'{"prompt": "a", "prompt": "b", "images": []}'):
        error_of(await client.post(PATH, content=content, headers=headers), 400)
    twice = f'{{"prompt": "a", "images": [{{"image_url": "", "image_url": "{"x" * 9}"}}]}}'
    error_of(await client.post(PATH, content=twice, headers=headers), 400)
    error_of(await client.post(PATH, content=b" " * 200_001, headers=headers), 413)
    packed = headers | {"content-encoding": "gzip"}
    error_of(await client.post(PATH, content=b"{}", headers=packed), 415)


async def test_unknown_fields_of_references_are_ignored_where_the_config_says_so() -> None:
    async with client_with(unknown_fields="ignore") as client:
        images = [IMAGE | {"detail": "high"}]
        [warning] = warnings_of(
            await edit(client, images=images, mask=MASK | {"type": "x"}, extra=1)
        )
        assert all(name in warning for name in ("'images.0.detail'", "'mask.type'", "'extra'"))
        error_of(await edit(client, images=[{"detail": "high"}]), 400)


class TextOnly(FakeBackend):
    """A backend whose model edits no images."""

    async def describe(self, deadline_s: float | None = None) -> ModelInfo:
        return replace(INFO, tasks=("text-to-image",), max_input_images=0)


@pytest.mark.parametrize(
    ("backend_of", "most", "reason"),
    [
        (FakeBackend, 1, "{} images are given; SomePipeline takes at most 1"),
        (TextOnly, 0, "SomePipeline does not support image-to-image; it supports text-to-image"),
    ],
)
async def test_more_images_than_the_model_takes_are_rejected_with_its_number(
    backend_of: type[FakeBackend], most: int, reason: str
) -> None:
    """The number is that of /v1/models, whatever form the images have."""
    backend = backend_of()
    transport = httpx.ASGITransport(create_api(CONFIG, backend, KeyRing(None, None)))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        [model] = (await client.get("/v1/models")).json()["data"]
        assert model["max_input_images"] == most
        parts = ("a.png", file_of(halves()))
        for names in (("image", "image"), ("image[]", "image[]"), ("image", "image[]")):
            files = [(name, parts) for name in names]
            response = await client.post(PATH, data={"prompt": "x"}, files=files)
            error = error_of(response, 400)
            assert error["param"] == "image"
            assert reason.format(2) in error["message"]
        error = error_of(await edit(client, images=[IMAGE] * 16), 400)
        assert reason.format(16) in error["message"]
        response = await client.post(PATH, data={"prompt": "x"}, files=[("image[]", parts)] * 17)
        assert "more than 16 times" in error_of(response, 400)["message"]
        assert backend.received == []
        one = await client.post(PATH, data={"prompt": "x"}, files=[("image[]", parts)])
        assert one.status_code == (200 if most else 400)
