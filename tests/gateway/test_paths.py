"""Paths, methods and ways of sending, over a socket as clients and proxies send them."""

import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urljoin

import httpx
import pytest

from serve_app.gateway.auth import KeyRing
from serve_app.gateway.routes import create_api
from tests.fakes.backend import CONFIG, FakeBackend
from tests.gateway.test_prefix import gateway

BODY = b'{"prompt": "a"}'


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with gateway("") as url:
        yield int(url.rsplit(":", 1)[1])


def exchange(port: int, request: bytes) -> bytes:
    """Send these bytes, and return what the server answers until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


def send(port: int, method: str, target: str, headers: str = "") -> tuple[int, str, bytes]:
    """Return the status, the headers and the body of an answer."""
    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}"
    body = BODY if method in ("POST", "PUT") else b""
    head += f"Content-Length: {len(body)}\r\n\r\n"
    head_of_answer, _, content = exchange(port, head.encode() + body).partition(b"\r\n\r\n")
    status, _, found = head_of_answer.decode().partition("\r\n")
    return int(status.split()[1]), found.lower(), content


@pytest.mark.parametrize(
    "target",
    [
        "//v1/images/generations",
        "/v1//images/generations",
        "/v1/images//generations",
        "/./v1/images/generations",
        "/v1/../v1/images/generations",
        "/V1/images/generations",
        "/v1/images/generations%20",
        "/v1/images/generations%00",
        "//evil.example//",
    ],
)
def test_other_paths_are_a_404_in_openais_object(port: int, target: str) -> None:
    """No path is repaired, and none leads to another host."""
    status, headers, content = send(port, "POST", target)
    assert status == 404
    assert "location" not in headers
    assert "no such path" in json.loads(content)["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/images/edits"])
def test_a_slash_at_the_end_is_redirected_with_its_method_and_body(port: int, path: str) -> None:
    status, headers, content = send(port, "POST", f"{path}/")
    assert (status, content) == (307, b"")
    assert f"location: ../{path.rsplit('/')[-1]}" in headers
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", follow_redirects=True)
    with client:
        response = client.post(f"{path}/", content=BODY)
    if path.endswith("generations"):
        assert response.status_code == 200, response.text
    else:
        assert "multipart" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("HEAD", "/v1/images/generations", "post"),
        ("OPTIONS", "/v1/images/generations", "post"),
        ("GET", "/v1/images/edits", "post"),
        ("PUT", "/v1/images/edits", "post"),
        ("HEAD", "/v1/models", "get"),
        ("OPTIONS", "/v1/models", "get"),
    ],
)
def test_other_methods_are_a_405_with_the_allowed_one(
    port: int, method: str, path: str, allowed: str
) -> None:
    status, headers, content = send(port, method, path)
    assert status == 405
    assert f"allow: {allowed}" in headers
    assert (content == b"") == (method == "HEAD")


def test_a_target_may_be_absolute_or_escaped(port: int) -> None:
    for target in ("http://x/v1/images/generations", "/v1/images/%67enerations"):
        status, _, content = send(port, "POST", target)
        assert status == 200, content


def test_a_body_may_come_in_chunks(port: int) -> None:
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    answer = exchange(port, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("length", [len(BODY), 3_000])
def test_a_client_may_wait_before_it_sends_the_body(port: int, length: int) -> None:
    """As curl does with uploads. A body that is too long is rejected before it is sent."""
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(f"{head}Expect: 100-continue\r\nConnection: close\r\n\r\n".encode())
        first = connection.recv(100)
        if length > len(BODY):
            assert first.startswith(b"HTTP/1.1 413")
            return
        assert first == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(BODY)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("prefix", ["/a b", "/a+b", "/a%20b", "/a&b=(c)", "/a:b", "/a;b"])
def test_redirects_hold_below_a_prefix_with_special_characters(prefix: str) -> None:
    """A proxy removes the prefix, and uvicorn adds it again: the client must see its own path."""
    with gateway(prefix) as url:
        response = httpx.post(f"{url}/v1/images/generations/", content=BODY)
        assert response.status_code == 307
        location = response.headers["location"]
        outside = f"http://outside{quote(prefix)}/v1/images/generations"
        assert urljoin(f"{outside}/", location) == outside
        assert httpx.post(urljoin(str(response.url), location), content=BODY).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize(
    "path",
    [
        "//v1/models",
        "//health/../v1/models",
        "/health/v1/models",
        "/page/../v1/models",
        "/static-offline-docs/../v1/models",
        "/docs/v1/models",
        "/v1/models",
    ],
)
async def test_no_path_leads_around_the_keys(path: str) -> None:
    keys = json.dumps([{"name": "team", "sha256": "0" * 64}])
    api = create_api(CONFIG, FakeBackend(), KeyRing(None, keys))
    sent: list[Any] = []

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def keep(message: object) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(b"host", b"x")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await api(scope, receive, keep)  # type: ignore[arg-type]
    assert sent[0]["status"] in (401, 404)
    assert b"demo" not in b"".join(message.get("body", b"") for message in sent)
