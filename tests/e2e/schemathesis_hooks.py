"""Hooks that schemathesis loads: some of the files that it sends are images."""

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

schemathesis.openapi.format("binary", st.one_of(_IMAGES, _IMAGES, _BROKEN, st.binary()))
