"""Gateways that store images in a bucket or in a folder."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.config.models import AppConfig
from serve_app.config.storage import StorageConfig
from serve_app.gateway.auth import KeyRing
from serve_app.gateway.routes import create_api
from tests.fakes.backend import CONFIG, FakeBackend
from tests.s3 import bucket, s3, s3_server  # noqa: F401  (fixtures)


@pytest.fixture(params=["s3", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a store, of each kind."""
    if request.param == "s3":
        url: str = request.getfixturevalue("bucket")
        return url
    return f"file://{tmp_path}/new%20folder/images"


def config_with(storage: dict[str, Any], **gateway: Any) -> AppConfig:
    settings = CONFIG.gateway.model_copy(update={"storage": StorageConfig(**storage), **gateway})
    return CONFIG.model_copy(update={"gateway": settings})


@asynccontextmanager
async def gateway(
    url: str,
    backend: FakeBackend | None = None,
    keys: str | None = None,
    host: str = "test",
    gateway: dict[str, Any] | None = None,
    **storage: Any,
) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of a gateway that stores images at ``url``."""
    config = config_with({"url": url, **storage}, **(gateway or {}))
    api = create_api(config, backend or FakeBackend(), KeyRing(None, keys))
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
        yield client


async def linked(client: httpx.AsyncClient, **body: Any) -> list[str]:
    """Return the links of a request's answer, which has nothing else of the images."""
    asked = {"prompt": "x", "response_format": "url", **body}
    response = await client.post("/v1/images/generations", json=asked)
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert all(image.keys() == {"url", "seed", "safety"} for image in data)
    return [image["url"] for image in data]
