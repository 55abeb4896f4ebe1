"""Stored images over HTTP: who may read which, for how long, and in which parts."""

import io
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image

from serve_app.errors import ConfigError
from serve_app.gateway.auth import digest
from serve_app.gateway.storage import names
from serve_app.gateway.storage.names import ImageName
from serve_app.gateway.storage.store import PROBE, ImageStore
from tests.gateway.conftest import error_of
from tests.gateway.storage.conftest import config_with, gateway, linked

pytestmark = pytest.mark.anyio

KEYS = f"- {{name: a, sha256: {digest('sk-a')}}}"


class Clock:
    """The time of names, which only a test moves."""

    def __init__(self) -> None:
        self.now = time.time()

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(names, "time", clock)
    return clock


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
async def test_a_link_of_one_gateway_is_served_by_another_without_a_key(
    place: str, image_format: str
) -> None:
    async with gateway(place, keys=KEYS, host="one") as one, gateway(place, keys=KEYS) as other:
        one.headers["authorization"] = "Bearer sk-a"
        links = await linked(one, n=2, output_format=image_format, size="48x32")
        assert len(set(links)) == 2
        for link in links:
            assert link.startswith("http://one/v1/images/files/")
            # As an <img> of another web site's page asks for it.
            asked = {"sec-fetch-site": "cross-site", "sec-fetch-dest": "image"}
            response = await other.get(urlsplit(link).path, headers=asked)
            assert response.status_code == 200, response.text
            image = Image.open(io.BytesIO(response.content))
            assert (image.format, image.size) == (image_format.upper(), (48, 32))
            assert response.headers["content-type"] == f"image/{image_format}"
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["content-length"] == str(len(response.content))
        assert (await other.get("/v1/models")).status_code == 401
        described = (await other.get("/openapi.json")).json()["paths"]
        assert described["/v1/images/files/{name}"]["get"]["security"] == []
        assert described["/v1/models"]["get"]["security"] != []


async def test_expired_and_foreign_names_are_the_same_404(place: str, clock: Clock) -> None:
    async with gateway(place, ttl_s=100) as client:
        [link] = await linked(client)
        name = link.rpartition("/")[2]
        parsed = ImageName.parse(name)
        assert parsed is not None
        expiry, secret = name.split("-")
        longer = f"{int(expiry, 16) + 100:010x}-{secret}"
        foreign = [
            longer,
            name.replace("png", "jpeg"),
            name.upper(),
            name.removesuffix(".png"),
            f"{name}%0A",
            f"{name}%00",
            f"..%5C{name}",
            PROBE,
            "..",
            "%2E%2E",
            "%F0%9F%90%B6",
        ]
        unknown = await client.get(link.replace(name, ImageName.new("png", 9).text))
        assert error_of(unknown, 404)["code"] == "image_not_found"
        expected = unknown.text
        for other in foreign:
            for method in ("GET", "HEAD"):
                # As a client that normalizes no path.
                path = f"/v1/images/files/{other}".encode()
                url = httpx.URL("http://test").copy_with(raw_path=path)
                response = await client.request(method, url, headers={"if-none-match": "*"})
                assert response.status_code == 404
                assert (
                    method == "HEAD"
                    or "no such path" in response.text
                    or (response.text == expected)
                )
        for nothing in ("/v1/images/files/", "/v1/images/files", "/v1/images/files/a/b"):
            assert (await client.get(nothing)).status_code == 404
        clock.now = parsed.expires_at - 1.5
        fresh = await client.get(link)
        assert fresh.headers["cache-control"] == "private, max-age=1, immutable"
        clock.now = float(parsed.expires_at)
        assert (await client.get(link)).text == expected
        assert (await client.head(link, headers={"if-none-match": "*"})).status_code == 404
        # It is only the gateway that says so.
        store = ImageStore(config_with({"url": place}).gateway.storage)
        assert await store.size(parsed) == len(fresh.content)


PARTS = {
    "bytes=0-3": (0, 4),
    "bytes=4-": (4, None),
    "bytes=-5": (-5, None),
    "bytes=10-99999999": (10, None),
    "BYTES= 0-0 ": (0, 1),
    "bytes=-99999999": (0, None),
}
IGNORED = ("", "bytes=", "bytes=-", "bytes=5-2", "bytes=0-1,4-5", "lines=0-3", "bytes=a-b", "0-3")


async def test_clients_read_parts_and_keep_what_they_have(place: str, clock: Clock) -> None:
    async with gateway(place) as client:
        [link] = await linked(client)
        whole = await client.get(link)
        data, etag = whole.content, whole.headers["etag"]
        assert whole.headers["accept-ranges"] == "bytes"
        for asked, (start, stop) in PARTS.items():
            response = await client.get(link, headers={"range": asked, "if-range": etag})
            assert response.status_code == 206, asked
            assert response.content == data[start:stop]
            first = len(data) + start if start < 0 else start
            last = first + len(response.content) - 1
            assert response.headers["content-range"] == f"bytes {first}-{last}/{len(data)}"
            assert response.headers["content-type"] == "image/png"
        for asked in IGNORED:
            response = await client.get(link, headers={"range": asked})
            assert (response.status_code, response.content) == (200, data), asked
        changed = await client.get(link, headers={"range": "bytes=0-3", "if-range": '"other"'})
        assert (changed.status_code, changed.content) == (200, data)
        for asked in (f"bytes={len(data)}-", "bytes=-0", "bytes=999999999999999999-"):
            response = await client.get(link, headers={"range": asked})
            assert error_of(response, 416)["code"] == "http_error"
            assert response.headers["content-range"] == f"bytes */{len(data)}"
        for held in (etag, f"W/{etag}", f'"a", {etag}', "*"):
            response = await client.get(link, headers={"if-none-match": held})
            assert (response.status_code, response.content) == (304, b"")
            assert response.headers["etag"] == etag
        other = await client.get(link, headers={"if-none-match": '"a"'})
        assert (other.status_code, other.content) == (200, data)
        head = await client.head(link)
        assert (head.status_code, head.content) == (200, b"")
        same = ("content-length", "content-type", "etag", "cache-control")
        assert [head.headers[name] for name in same] == [whole.headers[name] for name in same]
        for method in ("POST", "PUT", "DELETE"):
            assert (await client.request(method, link)).status_code == 405


async def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"storage\.url is 'file:///.*file/images', which"):
        async with gateway(f"file://{tmp_path}/file/images"):
            pass
