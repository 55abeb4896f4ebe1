"""Refuses long bodies before anything reads them. Plain ASGI, so that disconnects pass through.

Starlette has one as well, which answers in plain text rather than with OpenAI's error object.
"""

import asyncio
from collections.abc import Callable

from ray.exceptions import TaskCancelledError
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import BodyTooLarge, BodyTooSlow
from serve_app.gateway.errors import problem_of

READ_WITHIN_S = 300.0
"""Enough for the longest upload over a slow line. Who is slower holds a place of its key's."""


class BodyLimit:
    """Reads a body as far as its path allows, whatever length it claims, then calls ``app``."""

    def __init__(self, app: ASGIApp, max_bytes: Callable[[str], int]) -> None:
        """``max_bytes``: by the path of the request, as routes have it."""
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        receive = _or_gone(receive)
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
            return  # nobody is there to answer
        pending = iter(messages)

        async def replay() -> Message:
            return next(pending, None) or await receive()

        await self._app(scope, replay, send)


def _or_gone(receive: Receive) -> Receive:
    """Serve's own raises where its proxy drops the call of a client that has gone away."""

    async def message() -> Message:
        try:
            return await receive()
        except TaskCancelledError:
            return {"type": "http.disconnect"}

    return message


async def _read(scope: Scope, receive: Receive, most: int) -> list[Message]:
    """The whole body, or what came of it before the client went away.

    Raises:
        BodyTooLarge: as soon as that is known.
    """
    claimed = Headers(scope=scope).get("content-length", "0")
    # What is no number, or one beyond reason, is found out by counting.
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
