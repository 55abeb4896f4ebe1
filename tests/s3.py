"""Fixtures of an S3 server that checks signatures."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn
from nanio.app import build_app
from nanio.auth.credentials import StaticCredentialResolver
from nanio.config import Settings

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
