"""Images and masks of AUTOMATIC1111's API, and the text in its files."""

from typing import Any

import httpx
import pytest

from tests.fakes.backend import LIMITS
from tests.gateway.sdapi.clients import IMAGE_TO_IMAGE, SILLYTAVERN
from tests.gateway.sdapi.gateway import (
    BLUE,
    SMALL,
    Backend,
    answered,
    b64,
    png_of,
    rejected,
    warnings_of,
)

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
async def test_an_image_is_changed(
    client: httpx.AsyncClient, backend: Backend, prefix: str
) -> None:
    answer = await answered(client, "/img2img", **IMAGE_TO_IMAGE, init_images=[prefix + BLUE])
    [params] = backend.received
    assert params.image is not None
    assert params.image.getpixel((5, 5)) == (0, 0, 255)
    assert params.mask_image is None
    assert (params.strength, params.noise_scheduler) == (0.75, "ddim")
    assert answer["info"]["denoising_strength"] == 0.75
    assert "Denoising strength: 0.75" in answer["files"][0].info["parameters"]
    assert "init_images" not in answer["parameters"]
    assert all(name in warnings_of(answer) for name in ("mask_blur", "inpaint_full_res"))


async def test_without_a_size_it_is_that_of_the_image(
    client: httpx.AsyncClient, backend: Backend
) -> None:
    image = b64(png_of((0, 0, 255), size=(48, 32)))
    await answered(client, "/img2img", prompt="x", init_images=[image])
    assert (backend.received[0].width, backend.received[0].height) == (48, 32)


GREYS = (0, 1, 127, 128, 254, 255)


@pytest.mark.parametrize("inverted", [False, True, 0, 1])
@pytest.mark.parametrize(
    ("mode", "pixels"),
    [
        ("L", GREYS),
        ("RGB", [(value,) * 3 for value in GREYS]),
        ("RGBA", [(value, value, value, 255) for value in GREYS]),
        ("RGBA", [(9, 9, 9, value) for value in GREYS]),
        ("LA", [(9, value) for value in GREYS]),
    ],
)
async def test_the_white_part_of_a_mask_changes(
    client: httpx.AsyncClient, backend: Backend, mode: str, pixels: Any, inverted: bool
) -> None:
    fields = IMAGE_TO_IMAGE | {"width": 48, "height": 48, "inpainting_mask_invert": inverted}
    image = b64(png_of((0, 0, 255), size=(48, 48)))
    mask = b64(png_of(*pixels, mode=mode, size=(48, 48)))
    await answered(client, "/img2img", **fields, init_images=[image], mask=mask)
    [params] = backend.received
    assert params.mask_image is not None
    assert params.mask_image.mode == "L"
    found = [params.mask_image.getpixel((8 * index + 4, 20)) for index in range(len(GREYS))]
    assert found == [255 - value if inverted else value for value in GREYS]


async def test_a_mask_of_another_size_is_scaled(
    client: httpx.AsyncClient, backend: Backend
) -> None:
    mask = b64(png_of(0, 255, mode="L", size=(16, 16)))
    await answered(client, "/img2img", **IMAGE_TO_IMAGE, init_images=[BLUE], mask=mask)
    [params] = backend.received
    assert params.mask_image is not None
    assert params.mask_image.size == (64, 64)
    assert [params.mask_image.getpixel((x, 30)) for x in (5, 58)] == [0, 255]


HUGE = b64(png_of((0, 0, 255), size=(1200, 1200)))


@pytest.mark.parametrize(
    ("images", "more", "param", "message"),
    [
        ([], {}, "init_images", "init_images"),
        ([BLUE, BLUE], {}, "init_images", "init_images"),
        (BLUE, {}, "init_images", "init_images"),
        ([""], {}, "init_images", "cannot be read"),
        (["http://localhost/a.png"], {}, "init_images", "base64"),
        (["é"], {}, "init_images", "base64"),
        ([b64(b"no image")], {}, "init_images", "cannot be read"),
        ([HUGE], {}, "init_images", "pixels"),
        ([BLUE], {"mask": "no base64!"}, "mask", "base64"),
        ([BLUE], {"mask": b64(b"no image")}, "mask", "cannot be read"),
        ([BLUE], {"mask": HUGE}, "mask", "pixels"),
        ([BLUE], {"mask": b64(png_of(0, mode="L"))}, "mask", "black everywhere"),
        (
            [BLUE],
            {"mask": b64(png_of(255, mode="L")), "inpainting_mask_invert": 1},
            "mask",
            "white everywhere",
        ),
        ([BLUE], {"denoising_strength": 0}, "denoising_strength", "denoising_strength"),
        ([BLUE], {"denoising_strength": 0.01}, "denoising_strength", "denoising_strength must"),
        ([BLUE], {"sampler_index": "Euler"}, "sampler_name", "too much noise"),
    ],
)
async def test_wrong_images_are_named(
    client: httpx.AsyncClient, images: Any, more: dict[str, Any], param: str, message: str
) -> None:
    fields = IMAGE_TO_IMAGE | {"init_images": images} | more
    error = await rejected(client, "/img2img", **fields)
    assert str(error["param"]).split(".")[0] == param
    assert message in error["message"]


async def test_images_may_be_as_large_as_uploads(
    client: httpx.AsyncClient, backend: Backend
) -> None:
    padding = {"stray": "x" * 100_000}
    await answered(client, "/img2img", **IMAGE_TO_IMAGE, init_images=[BLUE], **padding)
    await rejected(client, status=413, **SMALL, **padding)
    padding = {"stray": "x" * LIMITS.max_upload_bytes}
    await rejected(client, "/img2img", 413, **IMAGE_TO_IMAGE, init_images=[BLUE], **padding)


@pytest.mark.parametrize("prompt", ['a\nb, c: "d"', "Straße", "東京 \N{DOG}", "nul\0nul"])
async def test_the_text_of_an_image_is_that_of_its_tools(
    client: httpx.AsyncClient, backend: Backend, prompt: str
) -> None:
    answer = await answered(client, **(SILLYTAVERN | {"prompt": prompt}))
    [file] = answer["files"]
    file.load()
    assert file.getpixel((5, 5)) == (255, 0, 0)
    *head, last = file.info["parameters"].split("\n")
    assert "\n".join(head) == f"{prompt}\nNegative prompt: a square".replace("\0", "")
    assert last.startswith(
        "Steps: 8, Sampler: DDIM, CFG scale: 7, Seed: 7, Size: 64x64, Model: demo, Version: "
    )
