"""Uploads are read as a browser shows them: Chromium, which draws the same files on white."""

import base64
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page

from serve_app.config.limits import LimitsConfig
from serve_app.gateway.input_images import read_image
from tests.browser import running_browser
from tests.gateway.test_edits import file_of
from tests.gateway.test_png_colors import GREEN, chrm, cicp, gama
from tests.icc import gamma_curve, grey_profile, rgb_profile
from tests.pngs import GREY, GREY_ALPHA, PALETTE, RGB, RGB_ALPHA, png

DRAW = """async (file) => {
  const image = new Image();
  image.src = "data:application/octet-stream;base64," + file;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d", {colorSpace: "srgb"});
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, 0, 0);
  const drawn = context.getImageData(0, 0, canvas.width, canvas.height);
  return [drawn.width, drawn.height, Array.from(drawn.data)];
}"""

SIZE = (4, 4)
GRADIENT = Image.linear_gradient("L")
COLORS = Image.merge(
    "RGB",
    [GRADIENT.resize((16, 8)), GRADIENT.rotate(90).resize((16, 8)), Image.new("L", (16, 8), 90)],
)
XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>
</rdf:RDF></x:xmpmeta>"""


def declared(*chunks: tuple[bytes, bytes]) -> bytes:
    return png(SIZE, 8, RGB, [bytes((*GREEN, 8, 16, 30, 250, 20, 130, 90, 90, 90))] * 4, chunks)


def turned(orientation: int, image_format: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {} if image_format == "png" else {"quality": 100, "subsampling": 0}
    return file_of(COLORS, image_format, exif=exif, **options)


def animation(**options: Any) -> bytes:
    first, second = (Image.new("RGB", COLORS.size, color) for color in ("red", "blue"))
    green = Image.new("RGB", COLORS.size, "green")
    if options.get("default_image"):
        return file_of(green, save_all=True, append_images=[first, second], **options)
    return file_of(first, save_all=True, append_images=[second], **options)


FILES = {
    "no declared colors": declared(),
    "gamma 1": declared(gama(1.0)),
    "gamma 1.8": declared(gama(1.8)),
    "gamma 2.2": declared(gama(2.2)),
    "gamma 2.2, sRGB": declared(gama(2.2), chrm("sRGB")),
    "gamma 1.8, P3": declared(gama(1.8), chrm("P3")),
    "gamma 2.2, P3": declared(gama(2.2), chrm("P3")),
    "P3 without gamma": declared(chrm("P3")),
    "sRGB and gamma": declared((b"sRGB", b"\0"), gama(1.0), chrm("P3")),
    "sRGB in numbers": declared(cicp(1, 13)),
    "P3 in numbers": declared(cicp(12, 13)),
    "BT.2020 in numbers": declared(cicp(9, 13)),
    "BT.709 in numbers": declared(cicp(1, 1)),
    "BT.2020 of 10 bits in numbers": declared(cicp(9, 14)),
    "linear in numbers": declared(cicp(1, 8)),
    "gamma 2.2 in numbers": declared(cicp(12, 4)),
    "gamma 2.8 in numbers": declared(cicp(1, 5)),
    "P3 in numbers, with alpha": png(
        SIZE, 8, RGB_ALPHA, [bytes((200, 100, 50, 128)) * 4] * 4, [cicp(12, 13)]
    ),
    "profile of P3": file_of(COLORS, icc_profile=rgb_profile()),
    "profile of grey": file_of(COLORS.convert("L"), icc_profile=grey_profile(gamma_curve(1.0))),
    "inks": file_of(Image.new("CMYK", (16, 16), (0, 255, 255, 51)), "jpeg", quality=100),
    "transparent grey of 2 bits": png(
        SIZE, 2, GREY, [b"\x1b"] * 4, [(b"tRNS", struct.pack(">H", 2))]
    ),
    "transparent grey of 4 bits": png(
        SIZE, 4, GREY, [b"\x0f\x79"] * 4, [(b"tRNS", struct.pack(">H", 7))]
    ),
    "transparent grey of 16 bits": png(
        SIZE,
        16,
        GREY,
        [struct.pack(">4H", 0x80FF, 0, 0x8000, 0xFFFF)] * 4,
        [(b"tRNS", struct.pack(">H", 0x80FF))],
    ),
    "transparent color": png(
        SIZE, 8, RGB, [bytes((*GREEN, 1, 2, 3)) * 2] * 4, [(b"tRNS", struct.pack(">3H", *GREEN))]
    ),
    "transparent palette": png(
        SIZE,
        2,
        PALETTE,
        [b"\x19"] * 4,
        [(b"PLTE", bytes((255, 0, 0, 0, 255, 0, 0, 0, 255))), (b"tRNS", bytes((0, 128)))],
    ),
    "grey with alpha of 16 bits": png(
        SIZE, 16, GREY_ALPHA, [struct.pack(">8H", *range(0, 65536, 8192))] * 4
    ),
    **{
        f"{image_format} with orientation {orientation}": turned(orientation, image_format)
        for image_format in ("png", "jpeg")
        for orientation in range(1, 9)
    },
    "orientation in XMP only": file_of(COLORS, "jpeg", xmp=XMP, quality=100, subsampling=0),
    "animation": animation(),
    "animation with an image for other viewers": animation(default_image=True),
    "several images of a photo": file_of(
        COLORS, "mpo", save_all=True, append_images=[COLORS], quality=100
    ),
}


MOST = {"gamma 2.2, sRGB": 9, "gamma 2.2, P3": 9}
"""Largest differences, of 255, over 3. Programs that mean sRGB write a gamma of 2.2, and so it is
read. The browser takes it for a power, which is darker in the darkest colors."""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with running_browser() as browser:
        yield browser.new_page()


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_as_a_browser_shows_it(page: Page, name: str) -> None:
    data = FILES[name]
    width, height, shown = page.evaluate(DRAW, base64.b64encode(data).decode())
    pixels = read_image(data, LimitsConfig(), has_mask=True).pixels
    assert pixels.size == (width, height)
    drawn = np.array(shown).reshape(height, width, 4)[..., :3]
    assert np.abs(drawn - np.asarray(pixels).astype(int)).max() <= MOST.get(name, 3)
