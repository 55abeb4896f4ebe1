"""Ray's cancellation as an ASGI disconnect."""

import pytest
from ray.exceptions import TaskCancelledError
from starlette.types import Message, Receive, Scope, Send

from serve_app.deployments.ray_compat import CancelledAsDisconnect
from serve_app.gateway.body_limit import BodyLimit


@pytest.mark.anyio
async def test_a_call_that_serve_cancels_is_a_disconnect() -> None:
    received: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        received.extend([(await receive())["type"], (await receive())["type"]])

    messages = iter([{"type": "http.request", "body": b"{}"}])

    async def receive() -> Message:
        if (message := next(messages, None)) is None:
            raise TaskCancelledError
        return message

    async def send(message: Message) -> None:
        raise AssertionError(message)

    scope = {"type": "http", "path": "/", "headers": []}
    await CancelledAsDisconnect(BodyLimit(app, lambda path: 100))(scope, receive, send)
    assert received == ["http.request", "http.disconnect"]
