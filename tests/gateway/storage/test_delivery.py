"""Which requests get links, by their body and by the operator's default, and where links lead."""

import base64
import json
import sys
from typing import Any

import httpx
import pytest

from serve_app.config.models import parse_app_config
from serve_app.errors import ConfigError
from tests.fakes.backend import CONFIG, FakeBackend
from tests.gateway.conftest import error_of, post
from tests.gateway.openai_client import png, served
from tests.gateway.storage.conftest import config_with, gateway, linked

pytestmark = pytest.mark.anyio

ALIASES = {"gpt-image-1": "demo", "dall-e-*": "demo"}

LANGCHAIN: dict[str, Any] = {
    "prompt": "x",
    "n": 1,
    "size": "64x64",
    "model": "dall-e-2",
    "quality": "standard",
}
N8N: dict[str, Any] = {
    "prompt": "x",
    "model": "dall-e-3",
    "quality": "standard",
    "size": "64x64",
    "style": "vivid",
    "response_format": "url",
}

BODIES: list[tuple[dict[str, Any], list[str], str]] = [
    (LANGCHAIN, ["dall-e-*"], "url"),
    (LANGCHAIN | {"response_format": "url"}, [], "url"),
    (LANGCHAIN | {"response_format": "b64_json"}, ["*"], "b64_json"),
    (LANGCHAIN, ["gpt-image-1", "demo"], "b64_json"),
    (LANGCHAIN, ["dall-e-3"], "b64_json"),
    (N8N, [], "url"),
    (N8N | {"response_format": "b64_json"}, ["*"], "b64_json"),
    ({"prompt": "x"}, ["dall-e-*"], "b64_json"),
    ({"prompt": "x"}, ["*"], "url"),
    ({"prompt": "x"}, ["demo"], "url"),
    ({"prompt": "x", "response_format": None}, ["demo"], "url"),
    ({"prompt": "x", "model": "gpt-image-1"}, ["gpt-image-1"], "url"),
]
"""Bodies as clients send them, the operator's `default_for`, and the field of the answer."""


async def test_bodies_of_clients_get_links_or_files(tmp_path: Any) -> None:
    place = f"file://{tmp_path}"
    for body, default_for, field in BODIES:
        names = {"model_aliases": ALIASES}
        async with gateway(place, gateway=names, default_for=default_for) as client:
            response = await post(client, body)
            assert response.status_code == 200, response.text
            [image] = response.json()["data"]
            assert image.keys() == {field, "seed", "safety"}, (body, default_for)
            if field == "url":
                file = (await client.get(image["url"])).content
            else:
                file = base64.b64decode(image["b64_json"])
            assert file.startswith(b"\x89PNG")


def test_openais_client_reads_the_link(bucket: str) -> None:
    config = config_with({"url": bucket})
    with served(config, FakeBackend()) as api:
        made = api.client.images.generate(prompt="x", response_format="url", n=2)
        edited = api.client.images.edit(prompt="x", image=png(), response_format="url")
        for image in [*(made.data or ()), *(edited.data or ())]:
            assert image.b64_json is None
            assert image.url is not None
            file = httpx.get(image.url)
            assert (file.status_code, file.headers["content-type"]) == (200, "image/png")
            assert file.content.startswith(b"\x89PNG")


async def test_streams_and_the_other_api_have_no_links(tmp_path: Any) -> None:
    limits = {"sdapi": True}
    async with gateway(f"file://{tmp_path}", gateway=limits, default_for=["*"]) as client:
        body = {"prompt": "x", "stream": True}
        error = error_of(await post(client, body | {"response_format": "url"}), 400)
        assert error["param"] == "response_format"
        events = (await post(client, body)).text
        assert "b64_json" in events
        answer = (await client.post("/sdapi/v1/txt2img", json={"prompt": "x"})).json()
        assert base64.b64decode(answer["images"][0]).startswith(b"\x89PNG")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("public_url", "prefix"),
    [
        (None, "http://test/v1/"),
        ("https://images.example.com", "https://images.example.com/v1/"),
        ("https://example.com/ai/", "https://example.com/ai/v1/"),
    ],
)
async def test_links_begin_with_the_public_address(
    tmp_path: Any, public_url: str | None, prefix: str
) -> None:
    async with gateway(f"file://{tmp_path}", public_url=public_url) as client:
        [link] = await linked(client)
        assert link.startswith(f"{prefix}images/files/")


async def test_links_of_the_store_are_signed_by_it(bucket: str, s3: Any) -> None:
    async with gateway(bucket, presigned=True, ttl_s=60) as client, httpx.AsyncClient() as any_one:
        [link] = await linked(client, output_format="webp")
        assert link.startswith(f"{s3.endpoint}/{bucket.removeprefix('s3://')}/")
        file = await any_one.get(link)
        assert file.status_code == 200, file.text
        assert file.headers["content-type"] == "image/webp"
        assert file.headers["cache-control"] == "private, no-cache"
        assert "X-Amz-Expires=60" in link
        address, _, query = link.partition("?")
        for forged in (address, f"{address}?{query.replace('Expires=60', 'Expires=600')}"):
            assert (await any_one.get(forged)).status_code == 403
        # The gateway serves the same file, for links from before.
        again = await client.get(f"/v1/images/files/{address.rpartition('/')[2]}")
        assert again.content == file.content


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"url": "gs://bucket"}, "it must begin with s3:// or file://"),
    ({"url": "/srv/images"}, "it must begin with"),
    ({"url": "s3:///prefix"}, "names no bucket"),
    ({"url": "s3://user:secret@bucket"}, "leave out user"),
    ({"url": "s3://bucket?region=a"}, "leave out user"),
    ({"url": "file://host/images"}, "absolute path"),
    ({"url": "file:///"}, "absolute path"),
    ({"url": "file:///srv/%2E%2E/etc"}, r"without '\.\.'"),
    ({"url": "s3://b", "public_url": "images.example.com"}, "public_url is"),
    ({"url": "s3://b", "public_url": "https://a/?b"}, "public_url is"),
    ({"url": "s3://b", "ttl_s": 0}, "ttl_s"),
    ({"url": "s3://b", "presigned": True, "ttl_s": 700_000}, "at most 604800 s"),
    ({"url": "s3://b", "presigned": True, "public_url": "https://a"}, "one of them only"),
    ({"url": "file:///a", "presigned": True}, "a folder signs no links"),
    ({"url": "s3://b", "default_for": ["dalle"]}, "'dalle', which is no name of the model"),
    ({"url": "s3://b", "when_away": "wait"}, "when_away"),
    ({"default_for": ["*"]}, r"default_for has no effect without gateway\.storage\.url"),
    ({"urls": "s3://b"}, "gateway.storage.urls: unknown key"),
]


def test_wrong_settings_are_named() -> None:
    for storage, message in WRONG:
        with pytest.raises(ConfigError, match=message) as raised:
            parse_app_config({"gateway": {"storage": storage}})
        assert "secret" not in str(raised.value)
    names = {"model_aliases": ALIASES, "storage": {"url": "s3://b", "default_for": ["dall-e-2"]}}
    assert parse_app_config({"gateway": names}).gateway.storage.default_for == ("dall-e-2",)
    assert json.loads(CONFIG.model_dump_json())["gateway"]["storage"]["url"] is None


def test_storage_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"pip install 'diffusion-serve\[storage\]'"):
        parse_app_config({"gateway": {"storage": {"url": "s3://bucket"}}})
    assert parse_app_config({}).gateway.storage.url is None
