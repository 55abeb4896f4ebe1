"""A file in memory that may be read only so often: Pillow reads parts of a header one by one."""

import io

_ALWAYS = 10_000
_BYTES_PER_READ = 256
"""Fewer bytes for each read are those of no real file: pixels come in kilobytes."""


class TooManyParts(Exception):
    """A file whose parts are too many for its size."""


class BoundedFile(io.BytesIO):
    """The content of a file, which raises `TooManyParts` after very many reads."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._left = _ALWAYS + len(data) // _BYTES_PER_READ

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise TooManyParts
        return super().read(size)
