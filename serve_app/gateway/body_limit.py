"""Refuses long bodies before anything reads them. Plain ASGI, so that disconnects pass through."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import BodyTooLarge
from serve_app.gateway.errors import error_response


class BodyLimit:
    """Reads at most ``max_bytes`` of a body, whatever it claims to have, then calls ``app``."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        messages: list[Message] = []
        size = 0
        while not messages or messages[-1].get("more_body", False):
            message = await receive()
            if message["type"] == "http.disconnect":
                return  # nobody is there to answer
            messages.append(message)
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                error = BodyTooLarge(f"the body is longer than {self._max_bytes} bytes.")
                response = error_response(error.status, error.message, error.type, None, error.code)
                await response(scope, receive, send)
                return
        pending = iter(messages)

        async def replay() -> Message:
            return next(pending, None) or await receive()

        await self._app(scope, replay, send)
