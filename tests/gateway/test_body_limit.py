"""Bodies that do not end; their length is tested with the routes."""

import asyncio

import pytest
from ray.exceptions import TaskCancelledError
from starlette.types import Message, Receive, Scope, Send

from serve_app.gateway import body_limit
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


@pytest.mark.anyio
async def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.anyio
async def test_a_call_that_serve_drops_is_a_client_that_left() -> None:
    heard: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        heard.extend([(await receive())["type"], (await receive())["type"]])

    messages = iter([{"type": "http.request", "body": b"{}"}])

    async def receive() -> Message:
        if (message := next(messages, None)) is None:
            raise TaskCancelledError
        return message

    async def send(message: Message) -> None:
        raise AssertionError(message)

    scope = {"type": "http", "path": "/", "headers": []}
    await BodyLimit(app, lambda path: 100)(scope, receive, send)
    assert heard == ["http.request", "http.disconnect"]
