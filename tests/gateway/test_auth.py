"""API keys: authentication, rate limits and concurrency limits."""

import asyncio
import base64
import io
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from PIL import Image

from serve_app.errors import ConfigError
from serve_app.gateway import auth
from serve_app.gateway.auth import KeyRing, digest
from serve_app.gateway.routes import create_api
from tests.fakes.backend import CONFIG, LIMITS, FakeBackend
from tests.gateway.conftest import error_of, post

pytestmark = pytest.mark.anyio

PLAIN = f"- {{name: plain, sha256: {digest('sk-plain')}}}\n"
RATED = f"- {{name: rated, sha256: {digest('sk-rated')}, requests_per_minute: 2}}\n"
NARROW = f"- {{name: narrow, sha256: {digest('sk-narrow')}, max_concurrent: 1}}\n"


@asynccontextmanager
async def client_of(
    backend: FakeBackend, keys: KeyRing, prefix: str = ""
) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_api(CONFIG, backend, keys), root_path=prefix)
    async with httpx.AsyncClient(transport=transport, base_url=f"http://test{prefix}") as session:
        yield session


def using(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def as_password(key: str, user: str = "user") -> dict[str, str]:
    return {"authorization": f"Basic {base64.b64encode(f'{user}:{key}'.encode()).decode()}"}


async def test_only_known_keys_are_admitted(backend: FakeBackend) -> None:
    async with client_of(backend, KeyRing(None, PLAIN)) as client:
        for headers in (
            {},
            using("sk-other"),
            using(""),
            using(digest("sk-plain")),
            {"authorization": "Basic sk-plain"},
            {"authorization": "Basic"},
            as_password("sk-other"),
            as_password(""),
            as_password(digest("sk-plain")),
            {"authorization": f"Basic {base64.b64encode(b'sk-plain').decode()}"},
            {"authorization": f"Basic {base64.b64encode(b'sk-plain:').decode()}"},
            {"authorization": f"Basic {base64.b64encode(b'a:' + bytes([255])).decode()}"},
            {"authorization": "sk-plain"},
            using("\xff"),
        ):
            for path in ("/v1/models", "/v1/nothing", "/nothing", "/docs/nothing", "//v1/models"):
                encoded = {name: value.encode("latin-1") for name, value in headers.items()}
                response = await client.get(path, headers=encoded)
                assert error_of(response, 401)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.headers["x-should-retry"] == "false"
        error_of(await post(client, {"prompt": "x"}), 401)
        assert backend.received == []
        assert (await client.get("/v1/models", headers=using("sk-plain"))).status_code == 200
        for path in ("/", "/health", "/ready", "/docs", "/openapi.json"):
            assert (await client.get(path)).status_code == 200


async def test_a_key_may_be_the_password_of_basic(backend: FakeBackend) -> None:
    async with client_of(backend, KeyRing(None, PLAIN + RATED)) as client:
        for user in ("", "me", "plain"):
            headers = as_password("sk-plain", user)
            assert (await client.get("/v1/models", headers=headers)).status_code == 200
        for _ in range(2):
            headers = as_password("sk-rated")
            assert (await client.get("/v1/models", headers=headers)).status_code == 200
        error_of(await client.get("/v1/models", headers=using("sk-rated")), 429)


async def test_a_password_that_the_browser_adds_does_not_let_other_pages_in(
    backend: FakeBackend,
) -> None:
    cross = {"sec-fetch-site": "cross-site"}
    async with client_of(backend, KeyRing(None, PLAIN)) as client:
        response = await client.get("/v1/models", headers=as_password("sk-plain") | cross)
        assert error_of(response, 403)["code"] == "cross_site"
        response = await client.get("/v1/models", headers=using("sk-plain") | cross)
        assert response.status_code == 200


async def test_a_route_prefix_opens_no_path(backend: FakeBackend) -> None:
    """The path that Serve passes on has its ``route_prefix``, here /sd."""
    body = {"prompt": "x"}
    image = io.BytesIO()
    Image.effect_noise((100, 100), 90).save(image, "png")
    assert len(image.getvalue()) > LIMITS.max_body_bytes
    async with client_of(backend, KeyRing(None, PLAIN), "/sd") as client:
        for path in ("/v1/models", "/sd/v1/models", "/nothing"):
            error_of(await client.get(path), 401)
        error_of(await post(client, body), 401)
        assert backend.received == []
        client.headers = httpx.Headers(using("sk-plain"))
        assert (await post(client, body)).status_code == 200
        error_of(await post(client, {"prompt": "x" * LIMITS.max_body_bytes}), 413)
        response = await client.post(
            "/v1/images/edits", data=body, files={"image": ("a.png", image.getvalue())}
        )
        assert response.status_code == 200, response.text
        client.headers = httpx.Headers()
        for path in ("/", "/health", "/ready", "/docs", "/openapi.json"):
            assert (await client.get(path)).status_code == 200
        page = await client.get("http://test/sd")  # its links are relative
        assert page.headers["location"] == "./sd/"


async def test_the_name_of_the_key_is_in_the_log_and_the_key_is_not(
    backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    async with client_of(backend, KeyRing(None, PLAIN)) as client:
        body = {"prompt": "x"}
        await client.post("/v1/images/generations", json=body, headers=using("sk-plain"))
    assert "of plain" in caplog.text
    assert "sk-plain" not in caplog.text


async def test_the_rate_of_a_key_is_limited(backend: FakeBackend) -> None:
    async with client_of(backend, KeyRing(None, PLAIN + RATED)) as client:
        statuses = []
        for _ in range(4):
            response = await client.get("/v1/models", headers=using("sk-rated"))
            statuses.append(response.status_code)
        assert statuses == [200, 200, 429, 429]
        assert error_of(response, 429)["code"] == "rate_limit_exceeded"
        assert 50 <= int(response.headers["retry-after"]) <= 61
        assert "x-should-retry" not in response.headers
        assert (await client.get("/v1/models", headers=using("sk-plain"))).status_code == 200


async def test_the_concurrency_of_a_key_is_limited_including_streams(backend: FakeBackend) -> None:
    backend.slow_seed = 1
    async with client_of(backend, KeyRing(None, NARROW)) as client:
        body = {"prompt": "x", "seed": 1, "stream": True}

        def send(seed: int) -> "asyncio.Task[httpx.Response]":
            coroutine = client.post(
                "/v1/images/generations", json=body | {"seed": seed}, headers=using("sk-narrow")
            )
            return asyncio.ensure_future(coroutine)

        first = send(1)
        while not backend.received:
            await asyncio.sleep(0)
        response = await send(2)
        assert error_of(response, 429)["message"].startswith(
            "the key 'narrow' has reached its limit of 1"
        )
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert (await send(2)).status_code == 200


async def test_a_changed_file_is_read_again_and_a_broken_one_ignored(
    backend: FakeBackend,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(auth, "REREAD_EVERY_S", 0.0)
    path = tmp_path / "keys.yaml"

    def write(text: str) -> None:
        path.write_text(text)
        written = path.stat().st_mtime + len(text)  # clocks of file systems are coarse
        os.utime(path, (written, written))

    write(PLAIN)
    async with client_of(backend, KeyRing(path, RATED)) as client:

        async def status(key: str) -> int:
            return (await client.get("/v1/models", headers=using(key))).status_code

        assert [await status(key) for key in ("sk-plain", "sk-narrow", "sk-rated")] == [
            200,
            401,
            200,
        ]
        write(NARROW)
        assert [await status(key) for key in ("sk-plain", "sk-narrow", "sk-rated")] == [
            401,
            200,
            200,
        ]
        write("nonsense: [")
        assert await status("sk-narrow") == 200
        assert "the earlier API keys stay valid" in caplog.text
        path.unlink()
        assert await status("sk-narrow") == 200
        write("[]")
        assert await status("sk-narrow") == 401  # not open to all


async def test_a_failed_read_is_retried(
    backend: FakeBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "REREAD_EVERY_S", 0.0)
    path = tmp_path / "keys.yaml"
    path.write_text("[]")
    keys = KeyRing(path, None)
    path.write_text(PLAIN)
    read_text = Path.read_text
    failures = [OSError("stale file handle")]

    def failing(self: Path, encoding: str) -> str:
        if failures and self == path:
            raise failures.pop()
        return read_text(self, encoding)

    monkeypatch.setattr(Path, "read_text", failing)
    async with client_of(backend, keys) as client:
        statuses = [
            (await client.get("/v1/models", headers=using("sk-plain"))).status_code
            for _ in range(2)
        ]
    assert statuses == [401, 200]


async def test_other_sites_may_not_use_a_server_without_keys(backend: FakeBackend) -> None:
    from_elsewhere = {"sec-fetch-site": "cross-site", "content-type": "text/plain"}
    async with client_of(backend, KeyRing(None, None)) as client:
        response = await client.post(
            "/v1/images/generations", content='{"prompt": "x"}', headers=from_elsewhere
        )
        assert error_of(response, 403)["code"] == "cross_site"
        assert backend.received == []
        assert (await client.get("/", headers=from_elsewhere)).status_code == 200  # by a link
        for site in ("same-origin", "same-site", "none"):
            response = await client.get("/v1/models", headers={"sec-fetch-site": site})
            assert response.status_code == 200
    async with client_of(backend, KeyRing(None, PLAIN)) as client:
        response = await client.get("/v1/models", headers=from_elsewhere | using("sk-plain"))
        assert response.status_code == 200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b", "list"),
        ("- {name: a}", "sha256"),
        ("- {name: a, key: sk-secret}", "sha256"),
        (f"- {{name: a, sha256: {digest('x')}, key: sk-secret}}", "0.key"),
        ("- {name: a, sha256: sk-secret}", "sha256"),
        (PLAIN + PLAIN, "two API keys have the name 'plain'"),
        (PLAIN + PLAIN.replace("plain", "other"), "sha256"),
        (f"- {{name: a, sha256: {digest('x')}, requests_per_minute: 0}}", "requests_per_minute"),
        (f"- {{name: a, sha256: {digest('x')}, models: small}}", "0.models"),
        (f"- {{name: a, sha256: {digest('x')}, models: []}}", "0.models"),
        ("- [", "line"),
    ],
)
def test_wrong_entries_are_named_and_never_repeated(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    for ring in (lambda: KeyRing(None, text), lambda: KeyRing(path, None)):
        with pytest.raises(ConfigError, match=message) as caught:
            ring()
        assert "sk-secret" not in str(caught.value)


def test_a_missing_file_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml cannot be read"):
        KeyRing(tmp_path / "nothing.yaml", None)


async def test_the_api_description_requires_a_key_if_the_server_does(backend: FakeBackend) -> None:
    for keys in (KeyRing(None, PLAIN), KeyRing(None, None)):
        async with client_of(backend, keys) as client:
            described = (await client.get("/openapi.json")).json()
        paths = described["paths"]
        assert ("securitySchemes" in described["components"]) == bool(keys)
        assert ("security" in paths["/v1/models"]["get"]) == bool(keys)
        assert "security" not in paths["/health"]["get"]
