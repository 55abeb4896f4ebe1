"""Refuses long bodies before anything reads them. Plain ASGI, so that disconnects pass through.

Starlette has one as well, which answers in plain text rather than with OpenAI's error object.
"""

from collections.abc import Callable

from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import BodyTooLarge
from serve_app.gateway.errors import problem_of


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
        most = self._max_bytes(get_route_path(scope))
        claimed = Headers(scope=scope).get("content-length", "0")
        # What is no number, or one beyond reason, is found out by counting.
        size = int(claimed) if claimed.isdecimal() and len(claimed) < 20 else 0
        messages: list[Message] = []
        if size <= most:
            size = 0
            while size <= most and (not messages or messages[-1].get("more_body", False)):
                message = await receive()
                if message["type"] == "http.disconnect":
                    return  # nobody is there to answer
                messages.append(message)
                size += len(message.get("body", b""))
        if size > most:
            error = BodyTooLarge(f"the body is longer than {most} bytes.")
            await problem_of(error, scope).response()(scope, receive, send)
            return
        pending = iter(messages)

        async def replay() -> Message:
            return next(pending, None) or await receive()

        await self._app(scope, replay, send)
