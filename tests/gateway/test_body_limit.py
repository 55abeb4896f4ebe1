"""Bodies that do not end. Limits on length are tested with the routes."""

import asyncio

import pytest
from starlette.types import Message, Receive, Scope, Send

from serve_app.gateway import body_limit
from serve_app.gateway.body_limit import BodyLimit


@pytest.mark.anyio
async def test_a_body_that_ends_with_a_disconnect_does_not_reach_the_app() -> None:
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


@pytest.mark.anyio
async def test_a_body_that_is_too_slow_gets_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limit, "READ_WITHIN_S", 0.05)
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("not reached")

    async def receive() -> Message:
        await asyncio.sleep(0.01)  # a byte at a time, without end
        return {"type": "http.request", "body": b"{", "more_body": True}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/", "headers": []}
    await BodyLimit(app, lambda path: 10_000)(scope, receive, send)
    assert sent[0]["status"] == 408
    assert b"body_too_slow" in sent[1]["body"]
