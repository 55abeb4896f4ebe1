"""A limit on the length and duration of request bodies, in plain ASGI.

Starlette has one as well, which answers in plain text rather than with OpenAI's error object.
Disconnects of clients pass through.
"""

import asyncio
from collections.abc import Callable

from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import BodyTooLarge, BodyTooSlow
from serve_app.gateway.errors import problem_of

READ_WITHIN_S = 300.0
"""Enough for the longest upload over a slow line. A body that is being read counts towards
its key's concurrent requests."""


class BodyLimit:
    """ASGI middleware that reads the body, up to the limit of its path, before it calls ``app``."""

    def __init__(self, app: ASGIApp, max_bytes: Callable[[str], int]) -> None:
        """Set the limit: ``max_bytes`` maps the path of a request, as routes have it, to bytes."""
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(READ_WITHIN_S):
                messages = await _read(scope, receive, self._max_bytes(get_route_path(scope)))
        except TimeoutError:
            error = BodyTooSlow(f"the body did not come within {READ_WITHIN_S:g} s.")
            await problem_of(error, scope).response()(scope, receive, send)
            return
        except BodyTooLarge as error:
            await problem_of(error, scope).response()(scope, receive, send)
            return
        if messages[-1]["type"] == "http.disconnect":
            return  # the client has gone away
        pending = iter(messages)

        async def replay() -> Message:
            return next(pending, None) or await receive()

        await self._app(scope, replay, send)


async def _read(scope: Scope, receive: Receive, most: int) -> list[Message]:
    """Read the whole body, or the part that arrived before the client went away.

    Raises:
        BodyTooLarge: as soon as it is known to be too large.
    """
    claimed = Headers(scope=scope).get("content-length", "0")
    # Where the header is no number, or an absurd one, the bytes are counted.
    claims = int(claimed) if claimed.isdecimal() and len(claimed) < 20 else 0
    messages: list[Message] = []
    size = 0
    while True:
        if max(claims, size) > most:
            raise BodyTooLarge(f"the body is longer than {most} bytes.")
        if messages and not messages[-1].get("more_body", False):
            return messages
        messages.append(await receive())
        size += len(messages[-1].get("body", b""))
