"""What a client's program prints: the outcome of each of its calls, as JSON.

It needs nothing but Python: each client runs in an environment of its own.
"""

import base64
import json
import struct
import sys
import urllib.request
import zlib
from collections.abc import Callable

PROMPT = "a red circle on a blue background"

OPENAIS_MODEL = "gpt-image-1"
CHAT_MODEL = "gpt-5-mini"

SIDE_PX = 64


def report(calls: dict[str, Callable[[], list[bytes]]]) -> None:
    """Make the calls that the command line names, or all, and print their outcomes.

    An outcome is the size of each image, or the error.
    """
    outcomes: dict[str, object] = {}
    names = sys.argv[2:] or list(calls)
    for name, call in [(name, calls[name]) for name in names]:
        try:
            outcomes[name] = {"images": [size_of(image) for image in call()]}
        except Exception as error:  # noqa: BLE001  whatever a client raises is its outcome
            status = getattr(error, "status_code", None)
            message = f"{type(error).__name__}: {error}"
            outcomes[name] = {"status": status, "message": message[:1000]}
    json.dump(outcomes, sys.stdout)


def decoded(image: str) -> bytes:
    """Return the file of an image: base64, a data URL, or an address."""
    if image.startswith("http"):
        with urllib.request.urlopen(image) as answer:
            content: bytes = answer.read()
            return content
    return base64.b64decode(image.rpartition(",")[2])


def size_of(png: bytes) -> list[int]:
    """Return (width, height) of a PNG file."""
    if png[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"no PNG file: {png[:20]!r}")
    return list(struct.unpack(">II", png[16:24]))


def blue_png(alpha: bytes = b"\xff") -> bytes:
    """Return a blue image as a PNG file, with this opacity in its right half."""
    row = b"\0" + b"\x20\x40\xf0\xff" * (SIDE_PX // 2) + (b"\x20\x40\xf0" + alpha) * (SIDE_PX // 2)

    def chunk(kind: bytes, data: bytes) -> bytes:
        ends = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + ends

    header = struct.pack(">IIBBBBB", SIDE_PX, SIDE_PX, 8, 6, 0, 0, 0)
    pixels = zlib.compress(row * SIDE_PX)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(kind, data) for kind, data in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    )


def blue_url() -> str:
    """Return the blue image as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(blue_png()).decode()}"
