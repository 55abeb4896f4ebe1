"""The middleware in front of Serve's proxy, with Serve's own in between; tests/e2e has the rest."""

from typing import Any

import httpx
import pytest
from ray.serve._private.http_util import RequestIdMiddleware, convert_object_to_asgi_messages
from starlette.types import Receive, Scope, Send

from serve_app.gateway.proxy import middlewares
from tests.gateway.conftest import error_of

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("log_stays_ours")]


class Proxy:
    """Gives scripted answers in Serve's own messages, and records the requests."""

    def __init__(self, *answer: Any) -> None:
        self._answer = answer
        self.headers: list[tuple[bytes, bytes]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers = list(scope["headers"])
        for value in self._answer:
            if isinstance(value, Exception):
                raise value
            await send(value)


async def ask(
    proxy: Proxy, path: str = "/x", headers: dict[str, bytes] | None = None
) -> httpx.Response:
    [middleware] = middlewares()
    app = middleware.cls(RequestIdMiddleware(proxy), *middleware.args, **middleware.kwargs)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        return await client.get(path, headers=headers)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (404, "invalid_request_error"),
        (408, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
async def test_plain_text_becomes_an_error_object(status: int, kind: str) -> None:
    proxy = Proxy(*convert_object_to_asgi_messages("Path not found.", status_code=status))
    response = await ask(proxy, headers={"x-request-id": b"call-7"})
    assert error_of(response, status)["type"] == kind
    assert ("retry-after" in response.headers) == (status in (429, 503))
    assert response.headers.get_list("x-request-id") == ["call-7"]
    assert "Path not found" not in response.text


async def test_other_answers_pass_unchanged() -> None:
    for status, body in ((200, "all good"), (404, {"error": "of an application"})):
        messages = convert_object_to_asgi_messages(body, status_code=status)
        response = await ask(Proxy(*messages))
        assert (response.status_code, response.content) == (status, messages[1]["body"])
        assert len(response.headers.get_list("x-request-id")) == 1
    messages = convert_object_to_asgi_messages("draining", status_code=503)
    assert (await ask(Proxy(*messages), "/-/healthz")).text == "draining"


async def test_control_headers_do_not_reach_serve() -> None:
    proxy = Proxy(*convert_object_to_asgi_messages("fine"))
    given = {
        "x-request-timeout-seconds": b"0.01",
        "X-Request-Disconnect-Disabled": b"?1",
        "authorization": b"Bearer sk-key",
    }
    await ask(proxy, headers=given)
    names = [name for name, _ in proxy.headers]
    assert b"authorization" in names
    assert not {name for name in names if name.startswith(b"x-request-")} - {b"x-request-id"}


@pytest.mark.parametrize("given", [b"", b"\xe9", b"a b", b"x" * 201, b"a\tb"])
async def test_an_invalid_request_id_is_replaced(given: bytes) -> None:
    proxy = Proxy(*convert_object_to_asgi_messages("fine"))
    response = await ask(proxy, headers={"x-request-id": given})
    [drawn] = response.headers.get_list("x-request-id")
    assert len(drawn) == 36
    assert [value for name, value in proxy.headers if name == b"x-request-id"] == [drawn.encode()]


async def test_a_failing_proxy_answers_once_with_an_error_object() -> None:
    response = await ask(Proxy(UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "secret")))
    message = error_of(response, 500)["message"]
    assert response.headers["x-request-id"] in message
    assert "secret" not in message
    start, *_ = convert_object_to_asgi_messages("begun")
    with pytest.raises(RuntimeError, match="later"):
        await ask(Proxy(start, RuntimeError("later")))
