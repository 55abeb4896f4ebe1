"""Colors that a PNG declares in its chunks cICP, sRGB, gAMA and cHRM, without an ICC profile."""

import struct
from collections.abc import Sequence

import pytest
from PIL import Image

from serve_app.config.limits import LimitsConfig
from serve_app.errors import InvalidRequest
from serve_app.gateway.input_images import InputImage, read_image, read_mask
from tests.gateway.test_color_profiles import GREEN, GREEN_OF_P3, close, same
from tests.gateway.test_edits import file_of
from tests.icc import gamma_curve, rgb_profile
from tests.pngs import GREY, RGB, RGB_ALPHA, chunk, png

LIMITS = LimitsConfig()
SIZE = (4, 4)

TO_XYZ = {
    "P3": (
        (0.4865709, 0.2656677, 0.1982173),
        (0.2289746, 0.6917385, 0.0792869),
        (0.0, 0.0451134, 1.0439444),
    ),
    "BT.2020": (
        (0.6369580, 0.1446169, 0.1688810),
        (0.2627002, 0.6779981, 0.0593017),
        (0.0, 0.0280727, 1.0609851),
    ),
    "sRGB": (
        (0.4123908, 0.3575843, 0.1804808),
        (0.2126390, 0.7151687, 0.0721923),
        (0.0193308, 0.1191948, 0.9505322),
    ),
}
"""Matrices of the standards, from linear RGB to XYZ. All three have the white of daylight, D65."""

FROM_XYZ = (
    (3.2409699, -1.5373832, -0.4986108),
    (-0.9692436, 1.8759675, 0.0415551),
    (0.0556301, -0.2039770, 1.0569715),
)
"""Matrix of sRGB's standard, from XYZ to linear RGB."""

D65 = (31270, 32900)
CHRM = {
    "P3": (*D65, 68000, 32000, 26500, 69000, 15000, 6000),
    "BT.2020": (*D65, 70800, 29200, 17000, 79700, 13100, 4600),
    "sRGB": (*D65, 64000, 33000, 30000, 60000, 15000, 6000),
}
"""Content of the chunk: x and y of white, red, green and blue, times 100,000."""


def times(matrix: Sequence[Sequence[float]], vector: Sequence[float]) -> list[float]:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def expected(color: Sequence[int], gamma: float | None, space: str) -> tuple[int, ...]:
    """Compute a color in sRGB by the formulas of the standards; no gamma means sRGB's curve."""
    values = [part / 255 for part in color]
    if gamma is None:
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    else:
        linear = [value**gamma for value in values]
    found = times(FROM_XYZ, times(TO_XYZ[space], linear))
    clipped = [min(1.0, max(0.0, value)) for value in found]
    encoded = [12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055 for v in clipped]
    return tuple(round(255 * value) for value in encoded)


def gama(gamma: float) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", round(100_000 / gamma))


def chrm(space: str) -> tuple[bytes, bytes]:
    return b"cHRM", struct.pack(">8I", *CHRM[space])


def cicp(primaries: int, transfer: int, matrix: int = 0, full: int = 1) -> tuple[bytes, bytes]:
    return b"cICP", bytes((primaries, transfer, matrix, full))


def read(*chunks: tuple[bytes, bytes], color: Sequence[int] = GREEN) -> InputImage:
    return read_image(png(SIZE, 8, RGB, [bytes(color) * 4] * 4, chunks), LIMITS)


@pytest.mark.parametrize(
    ("chunks", "gamma", "space"),
    [
        ([gama(1.0)], 1.0, "sRGB"),
        ([gama(1.8)], 1.8, "sRGB"),
        ([gama(1.0), chrm("sRGB")], 1.0, "sRGB"),
        ([gama(1.8), chrm("P3")], 1.8, "P3"),
        ([gama(2.6), chrm("BT.2020")], 2.6, "BT.2020"),
        ([cicp(1, 1)], 2.4, "sRGB"),
        ([cicp(9, 14)], 2.4, "BT.2020"),
        ([cicp(12, 13)], None, "P3"),
        ([cicp(9, 13)], None, "BT.2020"),
        ([cicp(1, 8)], 1.0, "sRGB"),
        ([cicp(12, 4)], 2.2, "P3"),
        ([cicp(1, 5)], 2.8, "sRGB"),
    ],
    ids=str,
)
@pytest.mark.parametrize("color", [GREEN, (64, 64, 64), (250, 20, 130), (90, 100, 110)], ids=str)
def test_declared_colors_are_converted(
    chunks: list[tuple[bytes, bytes]], gamma: float | None, space: str, color: tuple[int, ...]
) -> None:
    result = read(*chunks, color=color)
    assert result.warnings == ()
    assert close(result.pixels.getpixel((2, 2)), expected(color, gamma, space), most=2)


def test_the_formulas_are_those_of_profiles() -> None:
    assert close(expected(GREEN, None, "P3"), GREEN_OF_P3)


@pytest.mark.parametrize(
    "chunks",
    [
        [(b"sRGB", b"\0")],
        [(b"sRGB", b"\0"), gama(1.0), chrm("P3")],
        [gama(2.2)],
        [gama(2.2), chrm("sRGB")],
        [chrm("sRGB")],
        [chrm("P3")],  # primaries alone count for no viewer
        [cicp(1, 13)],
        [cicp(1, 13), gama(1.0), chrm("P3")],
    ],
    ids=str,
)
def test_srgb_is_not_changed(chunks: list[tuple[bytes, bytes]]) -> None:
    """Programs that mean sRGB write a gamma of 2.2, which is its nearest power."""
    noise = Image.merge("RGB", [Image.effect_noise((64, 64), 90)] * 3)
    rows = [noise.tobytes()[192 * row : 192 * (row + 1)] for row in range(64)]
    result = read_image(png((64, 64), 8, RGB, rows, chunks), LIMITS)
    assert result.warnings == ()
    assert same(result.pixels, noise)


def test_the_standards_order_of_chunks_decides() -> None:
    """CICP, then the profile, then sRGB, then gamma and primaries."""
    for chunks, gamma, space in (
        ({"icc_profile": rgb_profile(curve=gamma_curve(1.0))}, 1.0, "P3"),
        ({"icc_profile": rgb_profile(), "first": [gama(1.0), (b"sRGB", b"\0")]}, None, "P3"),
        ({"icc_profile": rgb_profile(), "first": [cicp(1, 8)]}, 1.0, "sRGB"),
    ):
        first = chunks.pop("first", [])
        data = file_of(Image.new("RGB", SIZE, GREEN), **chunks)
        plain = png(SIZE, 8, RGB, [bytes(GREEN) * 4] * 4, first)  # type: ignore[arg-type]
        head, declared = data[:33], plain[33 : plain.index(b"IDAT") - 4]
        result = read_image(head + declared + data[33:], LIMITS)
        assert close(result.pixels.getpixel((2, 2)), expected(GREEN, gamma, space), most=2)


def test_a_profile_stands_in_for_hdr() -> None:
    """Programs add one to files of HDR, for viewers that lack it."""
    data = file_of(Image.new("RGB", SIZE, GREEN), icc_profile=rgb_profile())
    result = read_image(data[:33] + chunk(*cicp(9, 16)) + data[33:], LIMITS)
    assert result.warnings == ()
    assert close(result.pixels.getpixel((2, 2)), GREEN_OF_P3, most=2)


def test_other_kinds_of_pixels_are_converted() -> None:
    grey = png(SIZE, 8, GREY, [bytes((64,) * 4)] * 4, [gama(1.0)])
    assert close(read_image(grey, LIMITS).pixels.getpixel((2, 2)), (137,) * 3)
    pixel = struct.pack(">H", 64 * 257)
    deep = png(SIZE, 16, GREY, [pixel * 4] * 4, [gama(1.0), chrm("P3")])
    assert close(read_image(deep, LIMITS).pixels.getpixel((2, 2)), (137,) * 3)
    row = bytes((*GREEN, 128)) * 4
    blended = read_image(png(SIZE, 8, RGB_ALPHA, [row] * 4, [cicp(12, 13)]), LIMITS, has_mask=True)
    on_white = tuple(255 - (255 - part) * 128 / 255 for part in GREEN_OF_P3)
    assert close(blended.pixels.getpixel((2, 2)), on_white, most=2)  # type: ignore[arg-type]
    assert blended.warnings == ()


def test_white_and_greys_stay_neutral_under_another_white() -> None:
    warm = (b"cHRM", struct.pack(">8I", 34567, 35850, *CHRM["sRGB"][2:]))
    for value in (255, 128, 20):
        result = read(gama(2.2), warm, color=(value,) * 3)
        assert close(result.pixels.getpixel((2, 2)), (value,) * 3)


@pytest.mark.parametrize(
    ("chunk", "reason"),
    [
        (cicp(9, 16), "transfer function 16"),
        (cicp(9, 18), "transfer function 18"),
        (cicp(2, 2), "primaries 2"),
        (cicp(12, 13, matrix=9), "RGB"),
        (cicp(12, 13, full=0), "RGB"),
        ((b"cICP", b"\1"), "cICP"),
        ((b"gAMA", struct.pack(">I", 0)), "gAMA"),
        ((b"gAMA", struct.pack(">I", 2**31)), "gAMA"),
    ],
    ids=str,
)
def test_colors_that_cannot_be_converted_get_a_warning(
    chunk: tuple[bytes, bytes], reason: str
) -> None:
    result = read(chunk)
    [warning] = result.warnings
    assert reason in warning
    assert "read as sRGB" in warning
    assert result.pixels.getpixel((2, 2)) == GREEN


@pytest.mark.parametrize("chromaticities", [[0] * 8, [*D65, *[30000] * 6]], ids=str)
def test_primaries_of_no_color_space_get_a_warning(chromaticities: list[int]) -> None:
    result = read(gama(1.0), (b"cHRM", struct.pack(">8I", *chromaticities)))
    [warning] = result.warnings
    assert "cHRM" in warning
    assert result.pixels.getpixel((2, 2)) == GREEN


@pytest.mark.parametrize("kind", [b"gAMA", b"cHRM"])
def test_a_cut_chunk_is_rejected(kind: bytes) -> None:
    with pytest.raises(InvalidRequest, match=kind.decode()):
        read((kind, b"\0"))


def test_a_mask_has_no_colors() -> None:
    row = bytes((0, 0, 0, 0, 9, 9, 9, 255)) * 2
    mask = read_mask(png(SIZE, 8, RGB_ALPHA, [row] * 4, [cicp(9, 16), gama(1.0)]), LIMITS, SIZE)
    assert mask.warnings == ()
    assert mask.pixels.getcolors() == [(8, 0), (8, 255)]
