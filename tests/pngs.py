"""PNG files made by hand, chunk by chunk, because Pillow writes only some of the kinds."""

import struct
import zlib
from collections.abc import Sequence

SIGNATURE = b"\x89PNG\r\n\x1a\n"

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
"""Color types."""


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    size: tuple[int, int],
    depth: int,
    color_type: int,
    rows: Sequence[bytes],
    chunks: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """Make a file from packed rows of pixels, with more chunks before the pixels."""
    header = struct.pack(">IIBBBBB", *size, depth, color_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    between = b"".join(chunk(kind, data) for kind, data in chunks)
    return (
        SIGNATURE + chunk(b"IHDR", header) + between + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )
