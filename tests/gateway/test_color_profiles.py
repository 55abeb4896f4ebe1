"""Color profiles of uploads: converted to sRGB, or ignored with a warning."""

import struct
import zlib
from typing import Any

import httpx
import pytest
from PIL import Image, ImageCms, ImageOps

from serve_app.config.limits import LimitsConfig
from serve_app.gateway.color_profiles import MAX_PROFILE_BYTES
from serve_app.gateway.input_images import InputImage, read_image, read_mask
from tests.fakes.backend import FakeBackend
from tests.gateway.test_edits import edit, file_of, halves, mask_of
from tests.icc import (
    SRGB_COLORANTS,
    SRGB_CURVE,
    cmyk_profile,
    gamma_curve,
    grey_profile,
    profile,
    rgb_profile,
)
from tests.pngs import RGB, chunk, png

pytestmark = pytest.mark.anyio

LIMITS = LimitsConfig()
GREEN = (100, 200, 80)
GREEN_OF_P3 = (45, 203, 56)
"""A color in Display P3, and the same color in sRGB, by the formulas of both standards."""

P3 = rgb_profile()
DARK_GREY = 64
DARK_GREY_OF_GAMMA_1 = 137
"""Grey that is linear in light, and the same grey in sRGB."""

GAMMA_1 = grey_profile(gamma_curve(1.0))


def read(image: Image.Image, image_format: str = "png", **options: Any) -> InputImage:
    return read_image(file_of(image, image_format, **options), LIMITS)


def close(color: object, expected: tuple[int, ...], most: int = 1) -> bool:
    assert isinstance(color, tuple)
    return all(abs(one - two) <= most for one, two in zip(color, expected, strict=True))


def same(one: Image.Image, two: Image.Image) -> bool:
    return (one.mode, one.size, one.tobytes()) == (two.mode, two.size, two.tobytes())


def own_warnings(response: httpx.Response) -> list[str]:
    """Return the warnings other than the backend's."""
    return [text for text in response.json()["warnings"] if text != "a warning"]


def png_with_iccp(image: Image.Image, content: bytes) -> bytes:
    """Return a PNG file with this chunk of a profile after its header."""
    data = file_of(image)
    return data[:33] + chunk(b"iCCP", content) + data[33:]


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
async def test_a_photo_of_a_phone_is_converted_to_srgb(
    client: httpx.AsyncClient, backend: FakeBackend, image_format: str
) -> None:
    options = {"lossless": True} if image_format == "webp" else {}
    data = file_of(Image.new("RGB", (64, 64), GREEN), image_format, icc_profile=P3, **options)
    response = await edit(client, data)
    assert response.status_code == 200, response.text
    assert own_warnings(response) == []
    image = backend.received[0].image
    assert image is not None
    assert close(image.getpixel((32, 32)), GREEN_OF_P3, most=2 if image_format == "jpeg" else 1)


def test_an_image_that_is_in_srgb_is_not_changed() -> None:
    image = Image.effect_noise((64, 64), 90)
    noise = Image.merge("RGB", (image, image.rotate(90), image.rotate(180)))
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for srgb in (own, rgb_profile(SRGB_COLORANTS)):
        result = read(noise, icc_profile=srgb)
        assert same(result.pixels, noise)
        assert result.warnings == ()
    result = read(image, icc_profile=grey_profile(SRGB_CURVE))
    assert same(result.pixels, image.convert("RGB"))


def test_grey_images_are_converted() -> None:
    grey = Image.new("L", (8, 8), DARK_GREY)
    for image_format in ("png", "jpeg"):
        result = read(grey, image_format, icc_profile=GAMMA_1)
        assert close(result.pixels.getpixel((4, 4)), (DARK_GREY_OF_GAMMA_1,) * 3)
        assert result.warnings == ()
    # Many programs write the profile of the screen to grey files too.
    bright = rgb_profile(curve=gamma_curve(1.0))
    result = read(grey, "jpeg", icc_profile=bright)
    assert close(result.pixels.getpixel((4, 4)), (DARK_GREY_OF_GAMMA_1,) * 3)


def test_grey_images_of_16_bits_are_converted() -> None:
    row = struct.pack("<8H", *[DARK_GREY * 256] * 8)
    result = read(Image.frombytes("I;16", (8, 8), row * 8), icc_profile=GAMMA_1)
    assert close(result.pixels.getpixel((4, 4)), (DARK_GREY_OF_GAMMA_1,) * 3)
    assert result.warnings == ()


def test_black_and_white_images_are_converted() -> None:
    image = Image.new("1", (8, 8), 1)
    image.putpixel((0, 0), 0)
    result = read(image, icc_profile=GAMMA_1)
    assert result.warnings == ()
    assert (result.pixels.getpixel((0, 0)), result.pixels.getpixel((4, 4))) == (
        (0, 0, 0),
        (255, 255, 255),
    )


def test_color_pngs_of_16_bits_are_converted() -> None:
    pixel = struct.pack(">3H", *(part * 257 for part in GREEN))
    profile_chunk = (b"iCCP", b"p\0\0" + zlib.compress(P3))
    data = png((8, 8), 16, RGB, [pixel * 8] * 8, [profile_chunk])
    assert close(read_image(data, LIMITS).pixels.getpixel((4, 4)), GREEN_OF_P3)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_transparency_stays_as_it_is(mode: str) -> None:
    """The colors are converted before they are laid on white, by the file's own transparency."""
    if mode == "LA":
        image = Image.new("LA", (8, 8), (DARK_GREY, 128))
        expected, icc = (DARK_GREY_OF_GAMMA_1,) * 3, GAMMA_1
        options = {}
    else:
        image = Image.new("RGBA", (8, 8), (*GREEN, 128))
        expected, icc = GREEN_OF_P3, P3
        options = {}
    if mode == "P":
        image = Image.new("P", (8, 8), 1)
        image.putpalette((0, 0, 0, *GREEN))
        options = {"transparency": bytes((255, 128))}
    on_white = tuple(round(255 + (part - 255) * 128 / 255) for part in expected)
    result = read(image, icc_profile=icc, **options)
    assert not any("profile" in text for text in result.warnings)
    assert close(result.pixels.getpixel((4, 4)), on_white)


def test_cmyk_images_are_converted() -> None:
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    naive = read(image, "jpeg", quality=100).pixels.getpixel((8, 8))
    assert close(naive, (0, 255, 255), most=2)
    result = read(image, "jpeg", quality=100, icc_profile=cmyk_profile())
    assert result.warnings == ()
    red, green, blue = result.pixels.getpixel((8, 8))  # type: ignore[misc]
    assert red < 100
    assert green < 50
    assert blue > 200


def test_orientation_and_profile_are_both_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (32, 16), "black")
    image.paste(GREEN, (0, 0, 16, 16))
    result = read(image, "jpeg", exif=exif, icc_profile=P3, quality=100, subsampling=0)
    assert result.pixels.size == (16, 32)
    assert close(result.pixels.getpixel((8, 4)), GREEN_OF_P3, most=2)
    assert close(result.pixels.getpixel((8, 28)), (0, 0, 0), most=2)


@pytest.mark.parametrize("icc", [None, P3, GAMMA_1, b"broken", rgb_profile(curve=b"x" * 12)])
def test_a_mask_is_read_by_its_alpha_only(icc: bytes | None) -> None:
    mask = mask_of()
    mask.paste((9, 9, 9, 77), (0, 0, 8, 8))
    options = {} if icc is None else {"icc_profile": icc}
    received = read_mask(file_of(mask, **options), LIMITS, mask.size)
    assert received.warnings == ()
    assert same(received.pixels, ImageOps.invert(mask.getchannel("A")))
    bomb = b"p\0\0" + zlib.compress(bytes(64 * 2**20))
    received = read_mask(png_with_iccp(mask, bomb), LIMITS, mask.size)
    assert received.pixels.getpixel((4, 4)) == 178


COMPRESSED = zlib.compress(P3)
BROKEN_CHUNKS = {
    "bomb": b"p\0\0" + zlib.compress(bytes(64 * 2**20)),
    "unknown compression": b"p\0\1" + COMPRESSED,
    "not compressed": b"p\0\0" + P3,
    "cut": b"p\0\0" + COMPRESSED[:100],
    "no name": b"",
    "no end of the name": b"p" * 20,
}


@pytest.mark.parametrize("content", BROKEN_CHUNKS.values(), ids=BROKEN_CHUNKS)
async def test_a_broken_chunk_of_a_profile_is_ignored_with_a_warning(
    client: httpx.AsyncClient, backend: FakeBackend, content: bytes
) -> None:
    response = await edit(client, png_with_iccp(Image.new("RGB", (64, 64), GREEN), content))
    assert response.status_code == 200, response.text
    [warning] = own_warnings(response)
    assert "the color profile of image is ignored" in warning
    assert backend.received[0].image is not None
    assert backend.received[0].image.getpixel((32, 32)) == GREEN


def test_a_chunk_with_a_wrong_checksum_is_ignored_with_a_warning() -> None:
    data = bytearray(png_with_iccp(halves(), b"p\0\0" + COMPRESSED))
    data[33 + 8 + 3] ^= 1
    result = read_image(bytes(data), LIMITS)
    assert len(result.warnings) == 1
    assert same(result.pixels, halves())


BROKEN_PROFILES = {
    "no profile": (b"broken", "broken"),
    "empty": (b"\0" * 200, "broken"),
    "cut": (P3[:200], "broken"),
    "no curve": (rgb_profile(curve=b"x" * 12), "broken"),
    "wrong signature": (P3.replace(b"acsp", b"pcsa"), "broken"),
    "of grey images": (GAMMA_1, "for grey images"),
    "of printers": (cmyk_profile(), "for CMYK images"),
    "of a device link": (profile(b"link", b"RGB ", b"RGB ", {}), "broken"),
    "of Lab": (profile(b"spac", b"Lab ", b"XYZ ", {}), "'Lab'"),
}


@pytest.mark.parametrize(("icc", "reason"), BROKEN_PROFILES.values(), ids=BROKEN_PROFILES)
def test_a_profile_that_cannot_be_used_is_ignored_with_a_warning(icc: bytes, reason: str) -> None:
    image = Image.new("RGBA", (8, 8), (*GREEN, 255))
    result = read(image, icc_profile=icc)
    [warning] = result.warnings
    assert reason in warning
    assert "read as sRGB" in warning
    assert "0x" not in warning
    assert result.pixels.getpixel((4, 4)) == GREEN


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_a_profile_of_other_images_changes_nothing_else(mode: str) -> None:
    image = Image.new("RGB", (8, 8), GREEN).convert(mode)
    icc = P3 if mode == "CMYK" else cmyk_profile()
    without, with_one = read(image, "jpeg"), read(image, "jpeg", icc_profile=icc)
    assert same(with_one.pixels, without.pixels)
    assert [len(one.warnings) for one in (without, with_one)] == [0, 1]


def test_a_huge_profile_is_ignored_with_a_warning() -> None:
    icc = P3 + bytes(MAX_PROFILE_BYTES)
    [warning] = read(halves(), "jpeg", icc_profile=icc).warnings
    assert f"at most {MAX_PROFILE_BYTES} are allowed" in warning


def test_a_jpeg_that_lacks_a_part_of_its_profile_is_ignored_with_a_warning() -> None:
    data = file_of(halves(), "jpeg", icc_profile=P3 + bytes(70_000))
    start = data.index(b"\xff\xe2")
    [length] = struct.unpack_from(">H", data, start + 2)
    result = read_image(data[:start] + data[start + 2 + length :], LIMITS)
    assert len(result.warnings) == 1


async def test_the_completed_event_has_the_warning(client: httpx.AsyncClient) -> None:
    response = await edit(client, file_of(halves(), icc_profile=b"broken"), stream="true")
    assert "the color profile of image is ignored" in response.text


@pytest.mark.parametrize("icc", [P3, rgb_profile(SRGB_COLORANTS), GAMMA_1])
def test_the_engine_gets_no_profile(icc: bytes) -> None:
    """The pixels are in sRGB, so a profile in their description would be wrong."""
    assert "icc_profile" not in read(halves(), icc_profile=icc).pixels.info
    grey = halves().convert("LA")
    assert "icc_profile" not in read(grey, icc_profile=icc).pixels.info
