"""Disconnects in the middle of a body; its length is tested with the routes."""

import pytest
from starlette.types import Message, Receive, Scope, Send

from serve_app.gateway.body_limit import BodyLimit


@pytest.mark.anyio
async def test_a_client_that_leaves_in_mid_body_reaches_nobody() -> None:
    reached: list[str] = []
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append("app")

    messages = iter(
        [
            {"type": "http.request", "body": b"{", "more_body": True},
            {"type": "http.disconnect"},
        ]
    )

    async def receive() -> Message:
        return next(messages)

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/", "headers": []}
    await BodyLimit(app, lambda path: 100)(scope, receive, send)
    assert reached == []
    assert sent == []
