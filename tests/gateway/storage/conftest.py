"""An S3 server that checks signatures, a folder, and gateways that store images in them."""

import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from nanio.app import build_app
from nanio.auth.credentials import StaticCredentialResolver
from nanio.config import Settings

from serve_app.config.models import AppConfig
from serve_app.config.storage import StorageConfig
from serve_app.gateway.auth import KeyRing
from serve_app.gateway.routes import create_api
from tests.fakes.backend import CONFIG, FakeBackend
from tests.serve_process import free_port
from tests.waiting import wait_until


@dataclass(frozen=True)
class S3Server:
    """An S3 server with one user; a bucket is a folder of ``buckets``."""

    endpoint: str
    buckets: Path


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    buckets, port = tmp_path_factory.mktemp("buckets"), free_port()
    users = StaticCredentialResolver({"the-user": "the-secret"})
    app = build_app(Settings(data_dir=buckets, credentials=users))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, name="S3")
    thread.start()
    try:
        wait_until(lambda: server.started, what="the S3 server")
        yield S3Server(f"http://127.0.0.1:{port}", buckets)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The S3 server, with its address and credentials in the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-user")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
    return s3_server


@pytest.fixture
def bucket(s3: S3Server) -> str:
    """The URL of a place in a new bucket."""
    name = f"bucket-{len(list(s3.buckets.iterdir()))}"
    (s3.buckets / name).mkdir()
    return f"s3://{name}/some/prefix"


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
