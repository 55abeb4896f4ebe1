"""Small ICC profiles, made by hand, because Pillow brings only that of sRGB."""

import struct
from itertools import product

P3_COLORANTS = (
    (0.51512, 0.24120, -0.00105),
    (0.29198, 0.69225, 0.04189),
    (0.15710, 0.06657, 0.78407),
)
"""XYZ of red, green and blue of Display P3, adapted to D50."""

SRGB_COLORANTS = (
    (0.43607, 0.22249, 0.01392),
    (0.38515, 0.71687, 0.09708),
    (0.14307, 0.06061, 0.7141),
)

WHITE = (0.9642, 1.0, 0.8249)


def _fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def _xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(*values)


SRGB_CURVE = b"para\0\0\0\0\0\3\0\0" + _fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def gamma_curve(gamma: float) -> bytes:
    return b"para\0\0\0\0\0\0\0\0" + _fixed(gamma)


def profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """Assemble a profile of version 4 from its tags."""
    text = "test".encode("utf-16-be")
    described = (
        b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(text), 28) + text
    )
    tags = {b"desc": described, b"cprt": described, b"wtpt": _xyz(WHITE)} | tags
    table, data = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += struct.pack(">4sII", name, start + len(data), len(value))
        data += value + b"\0" * (-len(value) % 4)
    date = struct.pack(">6H", 2024, 1, 1, 0, 0, 0)
    header = struct.pack(
        ">I4sI4s4s4s", start + len(data), b"\0\0\0\0", 0x04200000, kind, space, connection
    )
    header += date + b"acsp" + b"\0" * 28 + _fixed(*WHITE)
    return header.ljust(128, b"\0") + table + data


def rgb_profile(
    colorants: tuple[tuple[float, ...], ...] = P3_COLORANTS, curve: bytes = SRGB_CURVE
) -> bytes:
    """Make the profile of a screen: three colorants and one curve. The default is Display P3."""
    tags = {
        name + suffix: value
        for name, colorant in zip((b"r", b"g", b"b"), colorants, strict=True)
        for suffix, value in ((b"XYZ", _xyz(colorant)), (b"TRC", curve))
    }
    return profile(b"mntr", b"RGB ", b"XYZ ", tags)


def grey_profile(curve: bytes) -> bytes:
    return profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": curve})


def cmyk_profile() -> bytes:
    """Make a profile in which cyan ink is a pure dark blue, and other inks only darken to grey."""
    corners = b""
    for c, m, y, k in product((0, 1), repeat=4):
        lightness = 255 // (1 + m + y + k) if not c else 76 // (1 + m + y + k)
        corners += bytes((lightness, 196 if c else 128, 25 if c else 128))
    identity = _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    steps = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + identity + steps * 4 + corners + steps * 3
    return profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table})
