"""Hooks that schemathesis loads: some of the files that it sends are images."""

import base64
import io

import schemathesis
from hypothesis import strategies as st
from PIL import Image


def _file_of(width: int, height: int, mode: str, color: int, kind: str) -> bytes:
    image = Image.new(mode, (width, height), color)
    if mode == "RGBA":
        image.putpixel((0, 0), (0, 0, 0, 0))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


_SIDES = st.sampled_from([1, 7, 64, 100])
_IMAGES = st.builds(
    _file_of,
    _SIDES,
    _SIDES,
    st.sampled_from(["L", "RGB", "RGBA"]),
    st.integers(0, 255),
    st.sampled_from(["png", "webp"]),
)
_BROKEN = st.builds(lambda data, end: data[:end], _IMAGES, st.integers(0, 200))

_FILES = st.one_of(_IMAGES, _IMAGES, _BROKEN, st.binary())
_URLS = st.builds(
    lambda start, data: start + base64.b64encode(data).decode(),
    st.sampled_from(["data:image/png;base64,", "data:image/png;base64,", "data:,", "https://a/"]),
    _FILES,
)

schemathesis.openapi.format("binary", _FILES)
schemathesis.openapi.format("uri", _URLS)
