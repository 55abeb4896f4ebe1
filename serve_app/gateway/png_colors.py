"""Colors that a PNG file declares without an ICC profile, made into one.

Pillow reads these chunks, or not, and changes no pixel by them. Browsers convert the colors.
"""

import struct
from collections.abc import Sequence

from serve_app.gateway.color_profiles import UnusableProfile
from serve_app.gateway.png_files import chunks_before_pixels

_Chromaticities = tuple[float, ...]
"""x and y of white, red, green and blue."""

_D65 = (0.3127, 0.3290)
_SRGB: _Chromaticities = (*_D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
_PRIMARIES: dict[int, _Chromaticities] = {
    1: _SRGB,
    9: (*_D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),  # BT.2020
    12: (*_D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),  # Display P3
}
"""Primaries by their numbers in ITU-T H.273, which cICP uses."""

_D50 = (0.9642, 1.0, 0.8249)
"""White of ICC profiles, in XYZ."""

_BRADFORD = ((0.8951, 0.2664, -0.1614), (-0.7502, 1.7135, 0.0367), (0.0389, -0.0685, 1.0296))
"""Matrix by which whites are adapted to each other."""

_GAMMA_OF_SRGB = 0.45455
_GAMMA_TOLERANCE = 0.01

_Matrix = Sequence[Sequence[float]]


def _fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def _power(gamma: float) -> bytes:
    return b"para\0\0\0\0\0\0\0\0" + _fixed(gamma)


def _power_with_line(gamma: float, offset: float, slope: float, until: float) -> bytes:
    """Return a curve that is a line up to a value, and a power with an offset after it."""
    scale = 1 / (1 + offset)
    return b"para\0\0\0\0\0\3\0\0" + _fixed(gamma, scale, offset * scale, 1 / slope, until)


_CURVE_OF_SRGB = _power_with_line(2.4, 0.055, 12.92, 0.04045)
_CURVES = {
    **dict.fromkeys((1, 6, 14, 15), _power(2.4)),  # of a screen for BT.709, as in browsers
    4: _power(2.2),
    5: _power(2.8),
    8: _power(1.0),
    13: _CURVE_OF_SRGB,
}
"""Curves by the numbers of transfer functions in ITU-T H.273. Those of HDR are missing."""


def profile_of(data: bytes) -> bytes | None:
    """Make the ICC profile that the chunk cICP of a file stands for. It overrides a profile.

    Raises:
        UnusableProfile: with the reason.
    """
    cicp = _chunk(data, b"cICP", 4)
    if cicp is None:
        return None
    primaries, transfer, matrix, full_range = cicp
    if matrix or not full_range:
        raise UnusableProfile("its chunk cICP declares no RGB in full range")
    if primaries not in _PRIMARIES:
        raise UnusableProfile(f"its chunk cICP has the primaries {primaries}, which are not known")
    if transfer not in _CURVES:
        raise UnusableProfile(
            f"its chunk cICP has the transfer function {transfer}, which is not known or of HDR"
        )
    return _profile(_PRIMARIES[primaries], _CURVES[transfer])


def profile_of_gamma(data: bytes) -> bytes | None:
    """Make the ICC profile that the chunks gAMA and cHRM of a file stand for.

    The chunk sRGB overrides them, and so does a profile. Without gAMA, cHRM counts for no viewer.

    Raises:
        UnusableProfile: with the reason.
    """
    if any(kind == b"sRGB" for kind, _, _ in chunks_before_pixels(data)):
        return None
    gama, chrm = _chunk(data, b"gAMA", 4), _chunk(data, b"cHRM", 32)
    if gama is None:
        return None
    curve, primaries = _CURVE_OF_SRGB, _SRGB
    gamma = int.from_bytes(gama) / 100_000
    if not 0.1 <= gamma <= 10:
        raise UnusableProfile(f"its chunk gAMA has the value {gamma:g}")
    if abs(gamma - _GAMMA_OF_SRGB) > _GAMMA_TOLERANCE:  # else sRGB is meant
        curve = _power(1 / gamma)
    if chrm is not None:
        primaries = tuple(value / 100_000 for value in struct.unpack(">8I", chrm))
    if (curve, primaries) == (_CURVE_OF_SRGB, _SRGB):
        return None
    return _profile(primaries, curve)


def _chunk(data: bytes, wanted: bytes, length: int) -> bytes | None:
    for kind, start, end in chunks_before_pixels(data):
        if kind == wanted:
            content = data[start + 8 : end - 4]
            if len(content) != length:
                raise UnusableProfile(f"its chunk {wanted.decode()} is broken")
            return content
    return None


def _profile(chromaticities: _Chromaticities, curve: bytes) -> bytes:
    """Make the ICC profile of a screen: three colorants, adapted to D50, and one curve."""
    try:
        colorants = _colorants(chromaticities)
        xyz = [b"XYZ \0\0\0\0" + _fixed(*colorant) for colorant in colorants]
    except (ZeroDivisionError, OverflowError, struct.error):
        raise UnusableProfile("its chunk cHRM has colors of no color space") from None
    tags = {b"wtpt": b"XYZ \0\0\0\0" + _fixed(*_D50)}
    for letter, colorant in zip((b"r", b"g", b"b"), xyz, strict=True):
        tags |= {letter + b"XYZ": colorant, letter + b"TRC": curve}
    table, content = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        table += struct.pack(">4sII", name, start + len(content), len(tag))
        content += tag + b"\0" * (-len(tag) % 4)
    header = struct.pack(">I4xI4s4s4s", start + len(content), 0x04200000, b"mntr", b"RGB ", b"XYZ ")
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _fixed(*_D50)
    return header.ljust(128, b"\0") + table + content


def _colorants(chromaticities: _Chromaticities) -> list[list[float]]:
    """Return XYZ of red, green and blue, relative to a white of D50.

    Raises:
        ZeroDivisionError: the primaries lie on a line, or one has no y.
    """
    white, *primaries = (
        (x / y, 1.0, (1 - x - y) / y)
        for x, y in zip(chromaticities[::2], chromaticities[1::2], strict=True)
    )
    # The colorants are the primaries, as bright as makes their sum white.
    columns = _transposed(primaries)
    shares = _times(_inverse(columns), white)
    cone_white, cone_d50 = _times(_BRADFORD, white), _times(_BRADFORD, _D50)
    ratios = [to / of for to, of in zip(cone_d50, cone_white, strict=True)]
    back = _inverse(_BRADFORD)
    adapted = []
    for primary, share in zip(primaries, shares, strict=True):
        cones = _times(_BRADFORD, [share * part for part in primary])
        adapted.append(_times(back, [a * b for a, b in zip(cones, ratios, strict=True)]))
    return adapted


def _transposed(matrix: _Matrix) -> _Matrix:
    return list(zip(*matrix, strict=True))


def _times(matrix: _Matrix, vector: Sequence[float]) -> list[float]:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def _cross(one: Sequence[float], two: Sequence[float]) -> list[float]:
    (a, b, c), (d, e, f) = one, two
    return [b * f - c * e, c * d - a * f, a * e - b * d]


def _inverse(matrix: _Matrix) -> _Matrix:
    """Invert a matrix of three rows by cross products.

    Raises:
        ZeroDivisionError: if it has no inverse.
    """
    one, two, three = matrix
    columns = [_cross(two, three), _cross(three, one), _cross(one, two)]
    determinant = sum(a * b for a, b in zip(one, columns[0], strict=True))
    if abs(determinant) < 1e-9:
        raise ZeroDivisionError
    return _transposed([[part / determinant for part in column] for column in columns])
