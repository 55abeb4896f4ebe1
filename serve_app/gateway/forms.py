"""Multipart forms, read strictly: Starlette guesses where a form is not as it says."""

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from serve_app.errors import InvalidRequest
from serve_app.gateway.errors import MOST_SHOWN

MAX_FIELDS = 64
"""Fields of a form, and files of it."""

_CHARSETS = ("utf-8", "utf8", "us-ascii")
_TRANSFER_ENCODINGS = ("7bit", "8bit", "binary")
"""Encodings that leave the bytes as they are. Forms have no others since RFC 7578."""


@asynccontextmanager
async def multipart_form(request: Request) -> AsyncIterator[FormData]:
    """Read a multipart form, and close its files in the end.

    Raises:
        InvalidRequest: it is not in UTF-8, a part is encoded, or the end is missing.
        HTTPException: it is malformed or too large.
    """
    async with aclosing(request.stream()) as stream:
        parser = _StrictParser(request.headers, stream, max_files=MAX_FIELDS, max_fields=MAX_FIELDS)
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise HTTPException(400, error.message) from None
    try:
        if not parser.ended:
            raise InvalidRequest(
                "the form ends without its closing boundary: a part of it is missing. Send it "
                "again."
            )
        yield form
    finally:
        await form.close()


class _StrictParser(MultiPartParser):
    """A parser that rejects what Starlette's one would take for something else."""

    ended = False

    def on_end(self) -> None:
        self.ended = True
        super().on_end()

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        name = self._current_part.field_name[:MOST_SHOWN]
        for header, value in self._current_part.item_headers:
            given = value.decode("latin-1").strip()
            if header == b"content-transfer-encoding":
                if given.lower() not in _TRANSFER_ENCODINGS:
                    raise InvalidRequest(
                        f"{name}: the part's Content-Transfer-Encoding is "
                        f"{given[:MOST_SHOWN]!r}; send its bytes as they are.",
                        name,
                    )
            elif header == b"content-type" and self._current_part.file is None:
                _, options = parse_options_header(value)
                charset = options.get(b"charset", b"utf-8").decode("latin-1")
                if charset.lower() not in _CHARSETS:
                    raise InvalidRequest(
                        f"{name} must be in UTF-8, not {charset[:MOST_SHOWN]!r}.", name
                    )

    def on_part_end(self) -> None:
        if self._current_part.file is None:
            try:
                self._current_part.data.decode()
            except UnicodeDecodeError:
                name = self._current_part.field_name[:MOST_SHOWN]
                raise InvalidRequest(f"{name} must be in UTF-8.", name) from None
        super().on_part_end()
