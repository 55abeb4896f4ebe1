"""A client of the API before a fake backend, and what the gateway's tests share."""

import base64
import io
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from PIL import Image

from serve_app.gateway.auth import KeyRing
from serve_app.gateway.requests_log import RequestRecord
from serve_app.gateway.routes import create_api
from tests.fakes.backend import CONFIG, FakeBackend


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make requests as old as the backend reports."""
    aged = property(lambda record: time.perf_counter() - record.received_at + 2.0)
    monkeypatch.setattr(RequestRecord, "age_s", aged)


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    api = create_api(CONFIG, backend, KeyRing(None, None))
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as session:
        yield session


async def post(client: httpx.AsyncClient, body: object) -> httpx.Response:
    return await client.post("/v1/images/generations", json=body)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """Return the error object, after checking that it has OpenAI's shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def decoded(b64_json: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))
