"""Text in image files: a chunk of PNG, and a comment in the EXIF of JPEG and WebP.

Pixels are not decoded, and stay as they are. Tools of A1111's web UI read the text of both.
"""

import struct
import zlib

from serve_app.protocol.images import ImageFormat

PNG_KEYWORD = "parameters"

_PNG_HEADER_BYTES = 8 + 25
"""The signature, and the first chunk, which has the size of the image."""

_JPEG_SEGMENT_BYTES = 65_535
"""Longest segment, with the two bytes of its length."""

_WEBP_HAS_EXIF = 0x08


class TextTooLong(Exception):
    """A text that is too long for the file. The text of the error is the reason."""


def with_text(data: bytes, image_format: ImageFormat, text: str) -> bytes:
    """Return an image file with a text. It must be one without EXIF, from `Encoding.encode`.

    Raises:
        TextTooLong: JPEG cannot hold it.
    """
    if image_format == "png":
        return _png(data, text)
    return _jpeg(data, _exif(text)) if image_format == "jpeg" else _webp(data, _exif(text))


def _png(data: bytes, text: str) -> bytes:
    """Add a ``tEXt`` chunk, or an ``iTXt`` chunk for characters beyond Latin-1."""
    name = PNG_KEYWORD.encode() + b"\0"
    text = text.replace("\0", "")  # it would end the text
    try:
        chunk = b"tEXt" + name + text.encode("latin-1")
    except UnicodeEncodeError:
        # Not compressed, without a language and a translated keyword.
        chunk = b"iTXt" + name + b"\0\0\0\0" + text.encode()
    framed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return data[:_PNG_HEADER_BYTES] + framed + data[_PNG_HEADER_BYTES:]


def _exif(text: str) -> bytes:
    """Return EXIF whose only entry is the text, as ``UserComment``."""
    # The characters have the byte order of the numbers. Readers expect the big-endian one.
    comment = b"UNICODE\0" + text.encode("utf-16-be")
    # The first directory has a pointer to the second one, and that one to the comment.
    first = struct.pack(">2sHIHHHIII", b"MM", 42, 8, 1, 0x8769, 4, 1, 26, 0)
    second = struct.pack(">HHHIII", 1, 0x9286, 7, len(comment), 44, 0)
    return first + second + comment


def _jpeg(data: bytes, exif: bytes) -> bytes:
    """Add a segment after the first one, which says that the file is JFIF."""
    length = 2 + 6 + len(exif)
    if length > _JPEG_SEGMENT_BYTES:
        raise TextTooLong(f"it has {len(exif)} bytes, and JPEG holds {_JPEG_SEGMENT_BYTES - 8}")
    start = 4 + struct.unpack_from(">H", data, 4)[0]
    segment = b"\xff\xe1" + struct.pack(">H", length) + b"Exif\0\0" + exif
    return data[:start] + segment + data[start:]


def _webp(data: bytes, exif: bytes) -> bytes:
    """Make the extended form of a file that has nothing but its pixels."""
    assert data[12:16] == b"VP8 "
    # Behind the chunk's header, the tag of the frame and its start code.
    width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    head = _riff(b"VP8X", bytes([_WEBP_HAS_EXIF, 0, 0, 0]) + sides)
    return _riff(b"RIFF", b"WEBP" + head + data[12:] + _riff(b"EXIF", exif))


def _riff(kind: bytes, content: bytes) -> bytes:
    """Frame a chunk, whose length is even."""
    return kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
