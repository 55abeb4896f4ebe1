"""Parameters in image files: where tools read them, and without a change of the pixels."""

import base64
import io
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from PIL import ExifTags, Image

from serve_app import __version__
from serve_app.gateway.file_text import TextTooLong, with_text
from serve_app.gateway.input_images import read_image
from serve_app.protocol.images import IMAGE_FORMATS, Encoding, ImageFormat
from tests.fakes.backend import INFO, LIMITS
from tests.gateway.conftest import post
from tests.gateway.test_edits import halves
from tests.gateway.test_other_clients import client_with

pytestmark = pytest.mark.anyio

TEXTS = ("a cat", "Straße 東京 \N{DOG}\nSteps: 4", "", "x" * 8_000, "odd")


def text_of(data: bytes) -> str | None:
    """Read the text as tools do; ``None`` without one."""
    image = Image.open(io.BytesIO(data))
    if image.format == "PNG":
        return image.info.get("parameters")
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if comment is None:
        return None
    assert comment.startswith(b"UNICODE\0")
    return str(comment[8:].decode("utf-16-be"))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [(64, 64), (33, 17)])
@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_a_text_is_read_again_and_changes_no_pixel(
    image_format: ImageFormat, size: tuple[int, int], text: str
) -> None:
    for quality in (1, 60, 95, 100):
        data = Encoding(image_format, quality).encode(halves(size))
        assert text_of(data) is None
        written = with_text(data, image_format, text)
        assert text_of(written) == text
        before, after = (Image.open(io.BytesIO(one)) for one in (data, written))
        assert (after.format, after.size, after.mode) == (before.format, before.size, "RGB")
        assert after.tobytes() == before.tobytes()
        assert "icc_profile" not in after.info
        read = read_image(written, LIMITS)  # as the input of an edit
        assert read.warnings == ()
        assert read.pixels.tobytes() == before.tobytes()


def test_a_text_of_png_has_no_end_within() -> None:
    data = Encoding("png").encode(halves())
    assert text_of(with_text(data, "png", "a\0b")) == "ab"


def test_a_text_that_jpeg_cannot_hold_is_an_error() -> None:
    data = Encoding("jpeg").encode(halves())
    longest = "x" * ((65_535 - 8 - 44 - 8) // 2)
    assert text_of(with_text(data, "jpeg", longest)) == longest
    with pytest.raises(TextTooLong, match="JPEG holds 65527"):
        with_text(data, "jpeg", longest + "x")
    webp = Encoding("webp").encode(halves())
    assert text_of(with_text(webp, "webp", longest + "x")) == longest + "x"


def files_of(response: httpx.Response) -> list[bytes]:
    assert response.status_code == 200, response.text
    return [base64.b64decode(image["b64_json"]) for image in response.json()["data"]]


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
async def test_files_have_their_parameters_where_the_config_says_so(image_format: str) -> None:
    body = {
        "prompt": "a cat, red",
        "negative_prompt": "a dog",
        "n": 2,
        "seed": 7,
        "size": "48x32",
        "num_inference_steps": 9,
        "guidance_scale": 2.5,
        "scheduler": "ddim",
        "acceleration": "fast",
        "lora": {"pixel": 1, "ink": 0.5},
        "output_format": image_format,
    }
    async with client_with(embed_parameters=True) as client:
        texts = [text_of(file) for file in files_of(await post(client, body))]
        assert texts == [
            "a cat, red <lora:ink:0.5> <lora:pixel:1>\nNegative prompt: a dog\n"
            f"Steps: 9, Sampler: DDIM, CFG scale: 2.5, Seed: {seed}, Size: 48x32, Model: demo, "
            f"Acceleration: fast, Version: diffusion-serve {__version__}"
            for seed in (7, 8)
        ]
        again = await post(client, body)
        assert [text_of(file) for file in files_of(again)] == texts
        assert again.json()["warnings"] == ["a warning"]
    async with client_with() as client:
        plain = files_of(await post(client, body))
        assert [text_of(file) for file in plain] == [None, None]


async def test_a_stream_has_the_parameters_in_its_image_only() -> None:
    body = {"prompt": "x", "seed": 7, "stream": True, "partial_images": 1}
    async with client_with(embed_parameters=True) as client:
        lines = (await post(client, body)).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    texts = [text_of(base64.b64decode(event["b64_json"])) for event in events]
    assert texts[0] is None
    assert str(texts[1]).startswith("x\nSteps: 20, Sampler: Automatic, Seed: 7, Size: 64x64")


async def test_a_response_with_the_image_tool_has_the_parameters() -> None:
    body = {"input": "x", "tools": [{"type": "image_generation", "seed": 7}]}
    async with client_with(embed_parameters=True) as client:
        [call] = (await client.post("/v1/responses", json=body)).json()["output"]
    assert "Seed: 7" in str(text_of(base64.b64decode(call["result"])))


async def test_an_edit_has_its_strength() -> None:
    files = {"image": ("a.png", Encoding("png").encode(halves()))}
    async with client_with(embed_parameters=True) as client:
        response = await client.post("/v1/images/edits", data={"prompt": "x"}, files=files)
        [file] = files_of(response)
    assert "Denoising strength: 0.5" in str(text_of(file))


async def test_parameters_that_do_not_fit_get_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = LIMITS.model_copy(update={"max_prompt_chars": 40_000})
    monkeypatch.setattr("tests.fakes.backend.INFO", replace(INFO, limits=limits))
    body = {"prompt": "x" * 40_000, "output_format": "jpeg"}
    async with client_with(embed_parameters=True) as client:
        response = await post(client, body)
        assert [text_of(file) for file in files_of(response)] == [None]
        assert "no text with the parameters" in response.json()["warnings"][-1]


async def test_the_other_api_writes_its_text_once() -> None:
    body: dict[str, Any] = {"prompt": "x <lora:ink:0.5>", "seed": 7}
    async with client_with(embed_parameters=True, sdapi=True) as client:
        response = await client.post("/sdapi/v1/txt2img", json=body)
        [image] = response.json()["images"]
    file = base64.b64decode(image)
    assert file.count(b"parameters\0") == 1
    assert str(text_of(file)).startswith("x <lora:ink:0.5>\nSteps: 20")
