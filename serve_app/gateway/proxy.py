"""Middleware of Serve's proxies: it drops clients' control headers and converts plain-text errors.

Serve calls `middlewares` if Ray was started with
``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve_app.gateway.proxy:middlewares`` in the
environment. It then applies to all applications behind the same proxies.
"""

import re
import uuid

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.gateway.errors import problem_of
from serve_app.serve_log import log_through_serve

_CONTROL_HEADERS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")
"""Headers by which a client could change Serve's time limit, or hide that it has gone away."""

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,200}")
"""Request ids that may go into logs and headers. Serve fails on bytes that are not UTF-8."""


def middlewares() -> list[Middleware]:
    """Return the middleware. Each proxy calls it when it starts."""
    log_through_serve()
    return [Middleware(ProxyGuard)]


class ProxyGuard:
    """ASGI middleware that drops control headers, and puts Serve's errors into OpenAI's object."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # Serve's own endpoints
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = (given if _REQUEST_ID.fullmatch(given) else str(uuid.uuid4())).encode()
        dropped = (*_CONTROL_HEADERS, b"x-request-id")
        headers = [(name, value) for name, value in scope["headers"] if name not in dropped]
        scope["headers"] = [*headers, (b"x-request-id", request_id)]
        started = replaced = False

        async def reject(error: Exception) -> None:
            nonlocal started, replaced
            started = replaced = True
            response = problem_of(error, scope).response()
            response.headers["x-request-id"] = request_id.decode()
            await response(scope, receive, send)

        async def pass_on(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                sent = Headers(raw=message["headers"])
                if message["status"] >= 400 and sent.get("content-type", "").startswith("text/"):
                    await reject(HTTPException(message["status"]))
                started = True
            if not replaced:
                await send(message)

        try:
            await self._app(scope, receive, pass_on)
        except Exception as error:
            if started:
                raise
            await reject(error)
