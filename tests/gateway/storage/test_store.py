"""A store that is away, before and after the generation, and a folder's expired images."""

import asyncio
import shutil
import socket
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_app.gateway.auth import KeyRing
from serve_app.gateway.routes import create_api
from serve_app.gateway.storage import store, sweep
from serve_app.gateway.storage.names import ImageName
from serve_app.protocol.backend import GenerationEvent
from tests.fakes.backend import FakeBackend
from tests.gateway.conftest import error_of, post
from tests.gateway.storage.conftest import config_with, gateway, linked
from tests.s3 import S3Server

pytestmark = pytest.mark.anyio

BODY = {"prompt": "x", "n": 2, "response_format": "url"}


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that accepts connections and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture(
    params=["no server", "silent", "no bucket, without an image", "wrong secret, without an image"]
)
def kind(request: pytest.FixtureRequest) -> str:
    """A reason for which a store takes no images; reads differ only in some."""
    reason: str = request.param
    return reason


@pytest.fixture
def away(
    kind: str,
    request: pytest.FixtureRequest,
    s3: S3Server,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """The URL of a store that takes no images."""
    monkeypatch.setattr(store, "CHECKED_WITHIN_S", 0.3)
    monkeypatch.setattr(store, "WITHIN_S", 0.5)
    match kind.partition(",")[0]:
        case "no server":
            monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        case "silent":
            monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("silent"))
        case "no bucket":
            return f"{bucket.partition('/some')[0]}-none"
        case "wrong secret":
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    return bucket


async def test_requests_for_links_are_rejected_before_anything_is_generated(
    away: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend = FakeBackend()
    async with gateway(away, backend) as client:
        for response in await asyncio.gather(*(post(client, BODY) for _ in range(3))):
            error = error_of(response, 503)
            assert error["code"] == "storage_unavailable"
            assert int(response.headers["retry-after"]) > 0
        assert backend.received == []
        [logged] = [one for one in caplog.records if one.name == store.__name__]
        assert "cannot take images" in logged.message
        assert "the-secret" not in caplog.text
        response = await post(client, BODY | {"response_format": "b64_json"})
        assert response.status_code == 200
        read = await client.get(f"/v1/images/files/{ImageName.new('png', 60).text}")
        if "without an image" in kind:
            assert error_of(read, 404)["code"] == "image_not_found"
        else:
            assert error_of(read, 503)["code"] == "storage_unavailable"


async def test_or_get_the_images_themselves_with_a_warning(away: str) -> None:
    backend = FakeBackend()
    async with gateway(away, backend, when_away="b64_json", default_for=["*"]) as client:
        for body in (BODY, {"prompt": "x", "n": 2}):
            response = await post(client, body)
            assert response.status_code == 200, response.text
            answer = response.json()
            assert all(image.keys() == {"b64_json", "seed", "safety"} for image in answer["data"])
            assert any("could not be stored" in text for text in answer["warnings"])
        assert len(backend.received) == 4


class Vanishing(FakeBackend):
    """A backend during whose generation the store's bucket vanishes."""

    def __init__(self, bucket: Path) -> None:
        super().__init__()
        self._bucket = bucket

    async def generate(self, *arguments: Any) -> AsyncGenerator[GenerationEvent, None]:
        shutil.rmtree(self._bucket, ignore_errors=True)
        async for event in super().generate(*arguments):
            yield event


async def test_a_generated_image_is_not_lost_and_the_store_may_come_back(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", store.__name__)
    monkeypatch.setattr(store, "AWAY_FOR_S", 0.0)
    folder = s3.buckets / bucket.split("/")[2]
    async with gateway(bucket, Vanishing(folder)) as client:
        response = await post(client, BODY)
        assert response.status_code == 200, response.text
        assert [image.keys() for image in response.json()["data"]] == [
            {"b64_json", "seed", "safety"}
        ] * 2
        assert any("could not be stored" in text for text in response.json()["warnings"])
        error_of(await post(client, BODY), 503)
    async with gateway(bucket) as client:
        error_of(await post(client, BODY), 503)
        folder.mkdir()
        assert len(await linked(client, n=2)) == 2
    messages = [one.getMessage() for one in caplog.records if one.name == store.__name__]
    assert messages[-1] == "the storage can take images again"


async def test_a_write_proves_for_a_while_that_the_store_is_there(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []
    put = store.obstore.put_async

    async def counted(place: Any, key: str, *rest: Any, **named: Any) -> Any:
        keys.append(key)
        return await put(place, key, *rest, **named)

    monkeypatch.setattr(store.obstore, "put_async", counted)
    async with gateway(bucket) as client:
        await asyncio.gather(*(linked(client) for _ in range(3)))
        await linked(client)
    assert keys.count(store.PROBE) == 1
    assert len(keys) == 5


async def test_expired_images_of_a_folder_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "SWEEP_EVERY_S", 0.01)
    expired, valid = ImageName.new("png", -5).text, ImageName.new("webp", 60).text
    kept = [valid, "notes.txt", f"copy-of-{expired}", store.PROBE]
    for name in [*kept, expired, f"{expired}#1"]:
        (tmp_path / name).write_bytes(b"x")
    config = config_with({"url": f"file://{tmp_path}"})
    api = create_api(config, FakeBackend(), KeyRing(None, None))
    async with asyncio.timeout(30), api.router.lifespan_context(api):
        while len(list(tmp_path.iterdir())) > len(kept):
            await asyncio.sleep(0.01)
        later = ImageName.new("png", -5).text
        (tmp_path / later).write_bytes(b"x")
        while (tmp_path / later).exists():
            await asyncio.sleep(0.01)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


async def test_the_sweep_survives_a_folder_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sweep, "SWEEP_EVERY_S", 0.01)
    sweeping = asyncio.create_task(sweep.sweep_always(tmp_path / "none"))
    async with asyncio.timeout(30):
        while len(caplog.records) < 2:
            await asyncio.sleep(0.01)
    assert not sweeping.done()
    sweeping.cancel()
