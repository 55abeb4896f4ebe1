"""Input images and masks: decoded as viewers show them, or rejected."""

import io
import json
import struct
import subprocess
import sys
import zlib
from typing import Any

import httpx
import pytest
from PIL import Image, ImageOps

from serve_app.config.limits import LimitsConfig
from serve_app.gateway.input_images import read_image
from tests.fakes.backend import LIMITS, FakeBackend
from tests.gateway.conftest import decoded, error_of
from tests.icc import gamma_curve, grey_profile, rgb_profile
from tests.pngs import SIGNATURE, chunk

pytestmark = pytest.mark.anyio


def file_of(image: Image.Image, image_format: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def halves(size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Make an image that is red on the left and blue on the right."""
    image = Image.new("RGB", size, "blue")
    image.paste("red", (0, 0, size[0] // 2, size[1]))
    return image


def mask_of(size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Make a mask that is transparent on the left."""
    mask = Image.new("RGBA", size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    return mask


async def edit(
    client: httpx.AsyncClient, image: bytes | None, mask: bytes | None = None, /, **fields: str
) -> httpx.Response:
    files = {"image": image, "mask": mask}
    return await client.post(
        "/v1/images/edits",
        data={"prompt": "x"} | fields,
        files={name: (f"{name}.png", data) for name, data in files.items() if data is not None},
    )


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
async def test_an_image_without_a_mask_is_generated_over(
    client: httpx.AsyncClient, backend: FakeBackend, image_format: str
) -> None:
    response = await edit(client, file_of(halves(), image_format), strength="0.5", seed="3")
    assert response.status_code == 200, response.text
    [received] = backend.received
    assert (received.task, received.strength, received.seed) == ("image-to-image", 0.5, 3)
    assert received.image is not None
    left, right = received.image.getpixel((8, 32)), received.image.getpixel((56, 32))
    assert left[0] > 200 > right[0]  # type: ignore[index, operator]
    assert decoded(response.json()["data"][0]["b64_json"]).size == (64, 64)
    assert response.json()["usage"]["input_tokens_details"]["image_tokens"] == 16


async def test_input_tokens_count_at_the_generated_size(client: httpx.AsyncClient) -> None:
    """Tokens count once for each generated image, as the API description says."""
    answer = (await edit(client, file_of(halves((640, 480))), n="2", size="48x32")).json()
    details = answer["usage"]["input_tokens_details"]
    assert details == {"text_tokens": 2 * 7, "image_tokens": 2 * 3 * 2}
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    described = schemas["InputTokensDetails"]["properties"]["image_tokens"]["description"]
    assert "input images, counted for each generated image. The first one counts at" in described


async def test_the_transparent_part_of_the_mask_is_generated_anew(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    response = await edit(client, file_of(halves()), file_of(mask_of()))
    assert response.status_code == 200, response.text
    [received] = backend.received
    assert received.task == "inpainting"
    assert received.mask_image is not None
    assert received.mask_image.getpixel((8, 32)) == 255
    assert received.mask_image.getpixel((56, 32)) == 0


async def test_every_field_of_a_form_is_parsed(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    response = await edit(
        client,
        file_of(halves()),
        model="demo",
        n="2",
        size="48x32",
        quality="high",
        output_format="jpeg",
        output_compression="50",
        negative_prompt="y",
        num_inference_steps="9",
        guidance_scale="2.5",
        scheduler="ddim",
        deadline_s="20",
        stream="false",
        **{"lora[ink]": "0.5", "lora[pixel]": "1"},
    )
    assert response.status_code == 200, response.text
    first, second = backend.received
    assert (first.width, first.height, first.num_inference_steps) == (48, 32, 9)
    assert (first.guidance_scale, first.noise_scheduler, first.deadline_s) == (2.5, "ddim", 20)
    assert first.lora == (("ink", 0.5), ("pixel", 1.0))
    assert second.seed == first.seed + 1
    await edit(client, file_of(halves()), lora='{"ink": 0.25}')
    assert backend.received[-1].lora == (("ink", 0.25),)
    await edit(client, file_of(halves()), lora="ink")
    assert backend.received[-1].lora == (("ink", 1.0),)


async def test_edits_stream_their_own_events(client: httpx.AsyncClient) -> None:
    response = await edit(
        client, file_of(halves()), stream="true", partial_images="2", progress="true"
    )
    names = [line[7:] for line in response.text.splitlines() if line.startswith("event: ")]
    assert names == ["image_edit.progress"] + 2 * [
        "image_edit.progress",
        "image_edit.partial_image",
    ] + ["image_edit.completed"]


async def test_a_photo_is_turned_by_its_exif_orientation(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn: the stored left side is shown on top
    response = await edit(client, file_of(halves((64, 32)), "jpeg", exif=exif))
    assert response.json()["size"] == "32x64"
    image = backend.received[0].image
    assert image is not None
    top, bottom = image.getpixel((16, 8)), image.getpixel((16, 56))
    assert top[0] > 200 > bottom[0]  # type: ignore[index, operator]


def exif_with(tag: int, kind: int, value: int) -> bytes:
    """Make EXIF data with a quarter turn and one more entry."""
    entries = struct.pack("<HHIIHHII", 0x0112, 3, 1, 6, tag, kind, 1, value)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)


@pytest.mark.parametrize(
    "malformed",
    [(0x010E, 5, 0), (0x0100, 2, 0), (0xA005, 9, 2**32 - 1), (0xA005, 7, 0)],
    ids=str,
)
async def test_the_rest_of_exif_may_be_malformed(
    client: httpx.AsyncClient, malformed: tuple[int, int, int]
) -> None:
    data = file_of(halves((64, 32)), "jpeg", exif=exif_with(*malformed))
    response = await edit(client, data)
    assert response.status_code == 200, response.text
    assert response.json()["size"] == "32x64"


@pytest.mark.parametrize("orientation", range(1, 9))
async def test_images_are_turned_as_pillow_turns_them(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.effect_noise((5, 3), 90).convert("RGB")
    data = file_of(image, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert read_image(data, LIMITS).pixels.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("given", "size", "generated"),
    [
        ((640, 480), None, "72x56"),  # as many pixels as the model's own size, about
        ((50, 30), None, "48x32"),
        ((3, 3), None, "8x8"),
        ((1, 20_000), None, "8x512"),
        ((640, 480), "64x64", "64x64"),
        ((640, 480), "auto", "72x56"),
    ],
)
async def test_an_image_is_fitted_to_the_sizes_of_the_model(
    client: httpx.AsyncClient, given: tuple[int, int], size: str | None, generated: str
) -> None:
    fields = {} if size is None else {"size": size}
    response = await edit(client, file_of(halves(given)), **fields)
    assert response.json()["size"] == generated


async def test_another_shape_is_cropped_rather_than_squeezed(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    image = Image.new("RGB", (192, 64), "blue")
    image.paste("red", (64, 0, 128, 64))
    mask = Image.new("RGBA", image.size, (0, 0, 0, 0))
    mask.paste((0, 0, 0, 255), (0, 0, 64, 64))
    await edit(client, file_of(image), file_of(mask), size="64x64")
    received = backend.received[0]
    assert received.image is not None
    assert received.mask_image is not None
    assert set(received.image.get_flattened_data()) == {(255, 0, 0)}
    assert received.mask_image.getextrema() == (255, 255)


async def test_transparent_parts_become_white(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    await edit(client, file_of(mask_of()))
    image = backend.received[0].image
    assert image is not None
    assert image.getpixel((8, 32)) == (255, 255, 255)
    assert image.getpixel((56, 32)) == (0, 0, 0)


async def test_grey_images_of_16_bits_are_read_as_8_bits(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    row = struct.pack("<64H", *(column * 1024 for column in range(64)))
    data = file_of(Image.frombytes("I;16", (64, 64), row * 64))
    assert (await edit(client, data)).status_code == 200
    read = backend.received[0].image
    assert read is not None
    assert [read.getpixel((column, 5)) for column in (0, 20, 63)] == [
        (value, value, value) for value in (0, 80, 252)
    ]


READ = """
import re, sys
from pathlib import Path
from serve_app.config.models import LimitsConfig
from serve_app.gateway.input_images import read_image

def peak_bytes():  # of this process alone; getrusage includes its parent
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

data, before = sys.stdin.buffer.read(), peak_bytes()
print(*read_image(data, LimitsConfig()).pixels.size, peak_bytes() - before)
"""


@pytest.mark.parametrize("icc", [None, rgb_profile(), grey_profile(gamma_curve(1.0))])
@pytest.mark.parametrize("mode", ["RGBA", "RGB", "LA", "L"])
def test_a_small_file_takes_no_more_memory_than_its_pixels_allow(
    mode: str, icc: bytes | None
) -> None:
    """The file has one color and the largest allowed size, in a few kilobytes."""
    side = 4_096
    assert LimitsConfig().max_image_pixels == side * side
    data = file_of(Image.new(mode, (side, side)), **({} if icc is None else {"icc_profile": icc}))
    assert len(data) < 100_000
    done = subprocess.run(
        [sys.executable, "-c", READ], input=data, capture_output=True, check=True, timeout=480
    )
    width, height, held_bytes = map(int, done.stdout.split())
    assert (width, height) == (side, side)
    # Grey, alpha and the converted grey of an image with both are channels of their own.
    most = 11 if mode == "LA" and icc is not None else 9
    assert held_bytes < most * side * side


def png_that_claims(width: int, height: int) -> bytes:
    """Make a small file whose header declares a huge image."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1_000)
    return SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("image", "mask", "fields", "param", "message"),
    [
        (None, None, {}, "image", "required"),
        (b"", None, {}, "image", "cannot be read"),
        (b"GIF89a", None, {}, "image", "PNG, JPEG, WEBP"),
        (file_of(halves(), "gif"), None, {}, "image", "PNG, JPEG, WEBP"),
        (file_of(halves())[:90], None, {}, "image", "cannot be read"),
        (png_that_claims(1001, 1000), None, {}, "image", "at most 1000000"),
        (png_that_claims(12_000, 12_000), None, {}, "image", "at most 1000000"),
        (png_that_claims(60_000, 60_000), None, {}, "image", "at most 1000000"),
        (png_that_claims(900, 900), None, {}, "image", "cannot be read"),
        (file_of(halves()), file_of(mask_of((8, 8))), {}, "mask", "same size"),
        (file_of(halves()), file_of(halves()), {}, "mask", "no transparency"),
        (
            file_of(halves()),
            file_of(Image.new("RGBA", (64, 64), "red")),
            {},
            "mask",
            "opaque everywhere",
        ),
        (file_of(halves()), b"nothing", {}, "mask", "cannot be read"),
        (file_of(halves()), None, {"strength": "0"}, "strength", "greater than 0"),
        (file_of(halves()), None, {"strength": "0.01"}, "strength", "steps must run"),
        (file_of(halves()), None, {"n": "many"}, "n", "integer"),
        (file_of(halves()), None, {"style": "vivid"}, "style", "unknown field"),
        (file_of(halves()), None, {"image": "text"}, "image", "must be a file"),
        (file_of(halves()), None, {"lora": "{"}, "lora", "not JSON"),
        (file_of(halves()), None, {"lora": "[" * 2_000}, "lora", "no LoRA adapter"),
        (file_of(halves()), None, {"lora": '{"a":' * 5_000}, "lora", "not JSON"),
        (file_of(halves()), None, {"lora[": "1"}, "lora[", "unknown field"),
        (file_of(halves()), None, {"seed[a]": "1"}, "seed", "integer"),
    ],
)
async def test_unusable_images_are_rejected_by_field(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    image: bytes | None,
    mask: bytes | None,
    fields: dict[str, str],
    param: str,
    message: str,
) -> None:
    response = await edit(client, image, mask, **fields)
    if image is None:
        assert "multipart" in error_of(response, 400)["message"]
        return
    error = error_of(response, 404 if "LoRA" in message else 400)
    assert error["param"] == param
    assert message in error["message"]
    assert "0x" not in error["message"]
    assert backend.received == []


async def test_uploads_have_a_limit_of_their_own(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    noise = Image.effect_noise((200, 200), 90)
    assert len(file_of(noise)) > 10_000
    assert (await edit(client, file_of(noise))).status_code == 200
    error = error_of(await edit(client, b"x" * 200_001), 413)
    assert "200000 bytes" in error["message"]


async def test_a_form_must_be_utf_8(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    image = file_of(halves()).replace(b"\r\n--", b"")

    async def answer(charset: str, prompt: bytes) -> httpx.Response:
        part = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
        content = (
            part % (b"prompt", prompt)
            + part.replace(b'"\r\n', b'"; filename="a.png"\r\n') % (b"image", image)
            + b"--x--\r\n"
        )
        headers = {"content-type": f"multipart/form-data; boundary=x{charset}"}
        return await client.post("/v1/images/edits", content=content, headers=headers)

    for charset in ("", "; charset=utf-8", '; charset="UTF-8"'):
        assert (await answer(charset, "ä".encode())).status_code == 200
        assert backend.received[-1].prompt == "ä"
    for name in ("undefined", "punycode", "utf-16", "idna", "x" * 1_000):
        error = error_of(await answer(f"; charset={name}", b"\xe9-x"), 400)
        assert f"in UTF-8, not '{name[:100]}'" in error["message"]


async def test_other_content_types_are_rejected(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/images/edits", content=json.dumps({"prompt": "x"}))
    assert "multipart/form-data" in error_of(response, 400)["message"]
    headers = {"content-type": "multipart/form-data; boundary=x"}
    for content in (b"", b"--x", b"--x\r\n\r\nno end", b"--x\r\nContent-Disposition: a\r\n\r\n"):
        response = await client.post("/v1/images/edits", content=content, headers=headers)
        error_of(response, 400)
    headers = {"content-type": "multipart/form-data"}
    error_of(await client.post("/v1/images/edits", content=b"x", headers=headers), 400)
