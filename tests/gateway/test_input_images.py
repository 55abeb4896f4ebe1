"""Kinds of image files: each is read as the standard of its format says, or rejected."""

import struct
import time
from typing import Any

import httpx
import pytest
from PIL import Image

from serve_app.config.limits import LimitsConfig
from serve_app.errors import InvalidRequest
from serve_app.gateway.input_images import read_image, read_mask
from serve_app.protocol.images import IMAGE_FORMATS, Encoding
from serve_app.protocol.inpainting import with_kept_part
from serve_app.protocol.params import GenerationParams
from tests.fakes.backend import FakeBackend
from tests.gateway.test_edits import edit, file_of
from tests.icc import rgb_profile
from tests.pngs import GREY, GREY_ALPHA, PALETTE, RGB, RGB_ALPHA, chunk, png

LIMITS = LimitsConfig()
SIZE = (4, 4)

WHITE = (255, 255, 255)
NOISE = Image.merge("RGB", [Image.effect_noise((32, 32), 90)] * 3)


def grey(depth: int, values: tuple[int, int, int, int], transparent: int | None = None) -> bytes:
    """Make a file whose four columns have these values, one of them declared transparent."""
    bits = "".join(f"{value:0{depth}b}" for value in values).ljust(8, "0")
    row = int(bits, 2).to_bytes(len(bits) // 8)
    chunks = [] if transparent is None else [(b"tRNS", struct.pack(">H", transparent))]
    return png(SIZE, depth, GREY, [row] * 4, chunks)


def columns(data: bytes) -> list[Any]:
    pixels = read_image(data, LIMITS).pixels
    return [pixels.getpixel((x, 2)) for x in range(4)]


def changed(data: bytes) -> list[Any]:
    """Return what a mask changes of each column: 255 for all of it."""
    mask = read_mask(data, LIMITS, SIZE).pixels
    return [mask.getpixel((x, 2)) for x in range(4)]


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_greys_of_every_depth_are_read(depth: int) -> None:
    most = 2**depth - 1
    values = (0, most // 3, most // 2, most)
    expected = [value * 255 / most for value in values]
    found = columns(grey(depth, values))
    assert [pixel[0] for pixel in found] == pytest.approx(expected, abs=1)
    assert all(len(set(pixel)) == 1 for pixel in found)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_grey_that_is_declared_transparent_is(depth: int) -> None:
    most = 2**depth - 1
    values = (most // 2, 0, most // 2, 0) if depth > 1 else (0, 1, 0, 1)
    data = grey(depth, values, transparent=values[0])
    found = columns(data)
    assert [found[0], found[2]] == [WHITE, WHITE]
    assert [found[1], found[3]] == [((0, 0, 0) if depth > 1 else WHITE)] * 2
    assert changed(data) == [255, 0, 255, 0]


def test_only_the_exact_grey_of_16_bits_is_transparent() -> None:
    assert changed(grey(16, (0x8000, 0x8001, 0x80FF, 0x0080), transparent=0x8001)) == [0, 255, 0, 0]


def test_a_transparent_color_of_16_bits_is_rejected() -> None:
    """Pillow keeps 8 bits of a color, so that others could be taken for it."""
    pixel = struct.pack(">3H", 0x80FF, 0x40FF, 0x20FF)
    data = png(SIZE, 16, RGB, [pixel * 4] * 4, [(b"tRNS", pixel)])
    for read in (lambda: read_image(data, LIMITS), lambda: read_mask(data, LIMITS, SIZE)):
        with pytest.raises(InvalidRequest, match="alpha channel or with 8 bits") as caught:
            read()
        assert caught.value.param in ("image", "mask")


PALETTE_CHUNKS = [(b"PLTE", bytes((255, 0, 0, 0, 255, 0, 0, 0, 255))), (b"tRNS", bytes((0, 128)))]


@pytest.mark.parametrize(
    ("data", "pixel", "change"),
    [
        (png(SIZE, 8, PALETTE, [b"\0\1\2\1"] * 4, PALETTE_CHUNKS), (127, 255, 127), 127),
        (png(SIZE, 4, PALETTE, [b"\x01\x21"] * 4, PALETTE_CHUNKS), (127, 255, 127), 127),
        (png(SIZE, 2, PALETTE, [b"\x19"] * 4, PALETTE_CHUNKS), (127, 255, 127), 127),
        (png(SIZE, 8, GREY_ALPHA, [b"\0\0\x40\x80\0\xff\0\xff"] * 4), (159, 159, 159), 127),
        (
            png(SIZE, 16, GREY_ALPHA, [b"\0\0\0\0\x40\0\x80\0\0\0\xff\xff\0\0\xff\xff"] * 4),
            (159, 159, 159),
            127,
        ),
        (
            png(SIZE, 16, RGB_ALPHA, [b"\0" * 8 + b"\0\0\x40\0\0\0\x80\0" + b"\xff" * 16] * 4),
            (127, 159, 127),
            127,
        ),
    ],
    ids=["palette", "palette of 4 bits", "palette of 2 bits", "LA", "LA of 16 bits", "RGBA of 16"],
)
def test_alpha_of_every_kind_is_laid_on_white(
    data: bytes, pixel: tuple[int, ...], change: int
) -> None:
    """The first column is transparent, the second half transparent, the third opaque."""
    found = columns(data)
    assert found[0] == WHITE
    assert found[1] == pytest.approx(pixel, abs=1)
    assert changed(data)[:3] == [255, change, 0]


FLOODS = {
    "chunks of a PNG": file_of(NOISE)[:33] + chunk(b"prVt", b"") * 200_000 + file_of(NOISE)[33:],
    "pixels of a PNG": file_of(NOISE)[:33] + chunk(b"IDAT", b"") * 200_000 + file_of(NOISE)[33:],
    "segments of a JPEG": b"\xff\xd8" + b"\xff\xe1\x00\x02" * 600_000 + file_of(NOISE, "jpeg")[2:],
    "padding of a JPEG": b"\xff\xd8" + b"\xff" * 2_000_000 + file_of(NOISE, "jpeg")[2:],
    "bytes of a JPEG": b"\xff\xd8\xff\xe1\x00\x02" + b"\0" * 2_000_000 + file_of(NOISE, "jpeg")[2:],
}
"""Files of a few megabytes whose parts Pillow reads one by one, for seconds."""


@pytest.mark.parametrize("name", FLOODS)
def test_a_file_of_very_many_parts_is_rejected_soon(name: str) -> None:
    started_at = time.process_time()
    with pytest.raises(InvalidRequest, match="too many parts"):
        read_image(FLOODS[name], LIMITS)
    assert time.process_time() - started_at < 0.5


def test_large_files_have_many_parts() -> None:
    """Programs write pixels of a PNG in chunks of 8 KiB, and profiles in segments."""
    image = Image.effect_noise((2048, 2048), 90)
    data = file_of(image)
    start = data.index(b"IDAT") - 4
    stream = b"".join(
        data[at + 8 : at + 8 + int.from_bytes(data[at : at + 4])] for at in _idat_chunks(data)
    )
    pieces = b"".join(chunk(b"IDAT", stream[at : at + 8192]) for at in range(0, len(stream), 8192))
    split = data[:start] + pieces + chunk(b"IEND", b"")
    assert read_image(split, LIMITS).pixels.tobytes() == image.convert("RGB").tobytes()
    profile = rgb_profile() + bytes(3_000_000)
    assert read_image(file_of(image, "jpeg", icc_profile=profile), LIMITS).warnings == ()


def _idat_chunks(data: bytes) -> list[int]:
    found, at = [], 8
    while at < len(data):
        if data[at + 4 : at + 8] == b"IDAT":
            found.append(at)
        at += 12 + int.from_bytes(data[at : at + 4])
    return found


def _turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("image_format", ["png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_as_its_image(orientation: int, image_format: str) -> None:
    """A viewer that draws a mask over a turned photograph keeps the EXIF of the photograph."""
    image = Image.new("RGBA", (5, 3), "red")
    image.putpixel((1, 0), (0, 0, 0, 0))
    options: dict[str, Any] = {"exif": _turned(orientation)}
    if image_format == "webp":
        options |= {"lossless": True}
    data = file_of(image, image_format, **options)
    pixels = read_image(data, LIMITS).pixels
    mask = read_mask(data, LIMITS, pixels.size).pixels
    assert [mask.getpixel((x, y)) for x in range(mask.width) for y in range(mask.height)] == [
        255 if pixels.getpixel((x, y)) == WHITE else 0
        for x in range(mask.width)
        for y in range(mask.height)
    ]


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("png", {}),
        ("jpeg", {}),
        ("jpeg", {"progressive": True}),
        ("webp", {}),
        ("webp", {"lossless": True}),
    ],
    ids=str,
)
def test_a_cut_file_is_rejected_unless_all_its_pixels_are_there(
    image_format: str, options: dict[str, Any]
) -> None:
    data = file_of(NOISE, image_format, **options)
    whole = read_image(data, LIMITS).pixels.tobytes()
    for length in range(len(data)):
        try:
            pixels = read_image(data[:length], LIMITS).pixels
        except InvalidRequest:
            continue
        assert pixels.tobytes() == whole, f"{length} of {len(data)} bytes"


def test_a_damaged_png_is_rejected() -> None:
    data = file_of(NOISE)
    for place in range(60, len(data) - 20, 97):
        damaged = data[:place] + bytes((data[place] ^ 4,)) + data[place + 1 :]
        with pytest.raises(InvalidRequest, match="cannot be read"):
            read_image(damaged, LIMITS)


@pytest.mark.parametrize("image_format", ["gif", "tiff", "bmp", "avif", "jpeg2000", "ico"])
def test_other_formats_are_rejected_by_name(image_format: str) -> None:
    with pytest.raises(InvalidRequest, match="one of PNG, JPEG, WEBP"):
        read_image(file_of(NOISE, image_format), LIMITS)


def test_a_photo_in_heic_is_rejected() -> None:
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    with pytest.raises(InvalidRequest, match="one of PNG, JPEG, WEBP"):
        read_image(data, LIMITS)


@pytest.mark.parametrize("adobe", [True, False])
def test_inks_without_a_profile_are_read_as_browsers_do(adobe: bool) -> None:
    """Values are inverted, as Adobe's programs write them, with or without Adobe's marker."""
    inks = (0, 255, 255, 51)
    data = file_of(Image.new("CMYK", (16, 16), inks), "jpeg", quality=100)
    start = data.index(b"\xff\xee")
    if not adobe:
        data = data[:start] + data[start + 16 :]
    expected = tuple((255 - ink) * (255 - inks[3]) / 255 for ink in inks[:3])
    assert read_image(data, LIMITS).pixels.getpixel((8, 8)) == pytest.approx(expected, abs=3)


def test_metadata_of_an_upload_is_not_in_the_answer() -> None:
    """The part that a mask keeps is that of the upload, pixels only."""
    secret = "place of the photograph"
    exif = Image.Exif()
    exif[0x010E] = secret
    image = Image.new("RGB", (64, 64), "red")
    mask = Image.new("L", (64, 64), 0)
    for given in ("png", "jpeg", "webp"):
        options: dict[str, Any] = {"exif": exif, "xmp": secret.encode()}
        if given == "jpeg":
            options["comment"] = secret
        pixels = read_image(file_of(image, given, **options), LIMITS).pixels
        assert pixels.info == {}
        params = GenerationParams("x", 1, image=pixels, mask_image=mask)
        result = with_kept_part(Image.new("RGB", (64, 64)), params)
        assert result.getpixel((5, 5)) == pixels.getpixel((5, 5))
        for image_format in IMAGE_FORMATS:
            assert secret.encode() not in Encoding(image_format).encode(result)


def frames(image_format: str, **options: Any) -> bytes:
    """Make an animation of a red and a blue frame."""
    first, second = (Image.new("RGB", SIZE, color) for color in ("red", "blue"))
    options |= {"lossless": True} if image_format == "webp" else {}
    return file_of(first, image_format, save_all=True, append_images=[second], **options)


@pytest.mark.parametrize("data", [frames("png"), frames("webp")], ids=["png", "webp"])
def test_the_first_frame_of_an_animation_is_read_with_a_warning(data: bytes) -> None:
    read = read_image(data, LIMITS)
    assert read.pixels.getpixel((2, 2)) == (255, 0, 0)
    assert read.warnings == ("image is an animation of 2 frames; only the first one is read.",)


def test_the_first_frame_is_that_of_the_animation() -> None:
    """Viewers that do not know animations show another image, which is no frame of it."""
    first, second = (Image.new("RGB", SIZE, color) for color in ("red", "blue"))
    green = Image.new("RGB", SIZE, "green")
    data = file_of(green, save_all=True, append_images=[first, second], default_image=True)
    read = read_image(data, LIMITS)
    assert read.pixels.getpixel((2, 2)) == (255, 0, 0)
    assert read.warnings == ("image is an animation of 2 frames; only the first one is read.",)


@pytest.mark.anyio
async def test_warnings_of_both_files_are_in_the_answer(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    frame = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    other = Image.new("RGBA", (64, 64), "red")
    data = file_of(frame, save_all=True, append_images=[other])
    answer = (await edit(client, file_of(NOISE), data, size="64x64")).json()
    assert "mask has" in answer["error"]["message"]
    answer = (await edit(client, data, data)).json()
    assert answer["warnings"] == [
        f"{name} is an animation of 2 frames; only the first one is read."
        for name in ("image", "mask")
    ] + ["a warning"]


@pytest.mark.anyio
@pytest.mark.parametrize("stream", ["false", "true"])
async def test_a_transparent_image_without_a_mask_gets_a_warning(
    client: httpx.AsyncClient, stream: str
) -> None:
    """DALL-E took the transparent part for the mask. Here it is a model's input: white."""
    image = Image.new("RGBA", (64, 64), "red")
    warning = "image is transparent in part, and there is no mask"
    assert warning not in (await edit(client, file_of(image), stream=stream)).text
    image.putpixel((3, 3), (255, 0, 0, 254))
    text = (await edit(client, file_of(image), stream=stream)).text
    assert warning in text
    assert "send the file as mask, too" in text
    image.putpixel((3, 3), (255, 0, 0, 100))
    data = file_of(image)
    assert warning not in (await edit(client, data, data, stream=stream)).text


def test_the_first_image_of_a_photo_with_several_is_read() -> None:
    """Phones add previews, depth maps and gain maps. They are no frames."""
    read = read_image(frames("mpo"), LIMITS)
    assert read.pixels.getpixel((2, 2)) == pytest.approx((255, 0, 0), abs=2)
    assert read.warnings == ()
