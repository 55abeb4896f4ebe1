"""Clients with fixed names of models, fields of other servers, and pages of other origins."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from serve_app.config.gateway import GatewayConfig
from serve_app.config.models import parse_app_config
from serve_app.errors import ConfigError
from serve_app.gateway.auth import KeyRing
from serve_app.gateway.routes import create_api
from tests.fakes.backend import CONFIG, FakeBackend
from tests.gateway.conftest import error_of, post
from tests.gateway.front_ends import CALLS, Call
from tests.gateway.openai_client import png

pytestmark = pytest.mark.anyio

ORIGIN = "https://app.example.com"
KEY = "- {name: a, sha256: 8254c329a92850f6d539dd376f4816ee2764517da5e0235514af433164480d7a}"
"""The entry of a key whose text is "k"."""


@asynccontextmanager
async def client_with(keys: str | None = None, **gateway: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of a gateway with these settings."""
    limits = CONFIG.engine.limits.model_copy(update={"max_body_bytes": 2**20})
    engine = CONFIG.engine.model_copy(update={"limits": limits})
    config = CONFIG.model_copy(update={"engine": engine, "gateway": GatewayConfig(**gateway)})
    api = create_api(config, FakeBackend(), KeyRing(None, keys))
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def warnings_of(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    warnings: list[str] = response.json()["warnings"]
    return [text for text in warnings if text != "a warning"]


async def test_aliases_are_names_of_the_model() -> None:
    aliases = {"gpt-image-1": CONFIG.model.id, "dall-e-*": CONFIG.model.id}
    async with client_with(model_aliases=aliases) as client:
        for name in ("gpt-image-1", "dall-e-3", CONFIG.model.id):
            assert warnings_of(await post(client, {"prompt": "x", "model": name})) == []
            model = await client.get(f"/v1/models/{name}")
            assert model.json()["id"] == CONFIG.model.id
        for name in ("gpt-image-10", "dall-e", "", "my-dall-e-3"):
            error = error_of(await post(client, {"prompt": "x", "model": name}), 404)
            assert error["param"] == "model"
            assert "'gpt-image-1', 'dall-e-*'" in error["message"]
        listed = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == [CONFIG.model.id]


async def test_any_name_is_accepted_with_a_warning() -> None:
    async with client_with(any_model=True, model_aliases={"a": CONFIG.model.id}) as client:
        [warning] = warnings_of(await post(client, {"prompt": "x", "model": "gpt-image-9"}))
        assert "gpt-image-9" in warning
        assert CONFIG.model.id in warning
        assert warnings_of(await post(client, {"prompt": "x", "model": "a"})) == []


@pytest.mark.parametrize(
    ("gateway", "message"),
    [
        ({"model_aliases": {"gpt-image-1": "sdxl"}}, "gpt-image-1 is 'sdxl', and the model is 'm'"),
        ({"model_aliases": {"": "m"}}, "empty name"),
        ({"cors_origins": ["app.example.com"]}, "SCHEME://HOST"),
        ({"cors_origins": [f"{ORIGIN}/"]}, "without a path"),
        ({"cors_origins": ["https://*.example.com"]}, "is no origin"),
        ({"unknown_fields": "drop"}, "unknown_fields"),
    ],
)
def test_wrong_settings_are_named(gateway: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("*", r"\*")):
        parse_app_config({"model": {"id": "m", "path": "/models/m"}, "gateway": gateway})


async def test_unknown_fields_are_dropped_and_named_where_the_config_ignores_them() -> None:
    body = {"prompt": "x", "seed": 2**62, "cfg_scale": 7, "enable_hr": False, "extra": None}
    async with client_with(unknown_fields="ignore") as client:
        response = await post(client, body)
        [warning] = warnings_of(response)
        assert all(repr(name) in warning for name in ("cfg_scale", "enable_hr", "extra"))
        assert response.json()["data"][0]["seed"] == 2**62
        many = {f"field_{number}": number for number in range(100)}
        [warning] = warnings_of(await post(client, {"prompt": "x"} | many))
        assert len(warning) < 300
    async with client_with() as client:
        assert error_of(await post(client, body), 400)["param"] == "cfg_scale"


@pytest.mark.parametrize(
    ("content", "param"),
    [
        ('{"prompt": "x", "a": 1, "n": "2"}', "n"),
        ('{"prompt": "x", "a": 1, "n": 1e400}', "n"),
        ('{"prompt": "x", "a": 1, "guidance_scale": NaN}', "guidance_scale"),
        ('{"prompt": "x", "a": 1, "a": 2}', "a"),
        ('{"prompt": "x", "prompt": "y", "a": 1}', "prompt"),
        ('{"a": 1}', "prompt"),
        ('{"prompt": "x", "frame_count": 2, "a": 1}', "frame_count"),
        ('{"prompt": "x", "a": 1' + "0" * 5000 + "}", None),
        ('{"prompt": "x", "a": ' + "[" * 100_000, None),
    ],
)
async def test_a_wrong_body_stays_an_error_beside_ignored_fields(
    content: str, param: str | None
) -> None:
    async with client_with(unknown_fields="ignore") as client:
        response = await client.post("/v1/images/generations", content=content)
        assert error_of(response, 400)["param"] == param


async def test_unknown_parts_of_a_form_are_dropped_and_named() -> None:
    files = {"image": ("a.png", png()), "control": ("b.png", png())}
    fields = {"prompt": "x", "cfg_scale": "7", "alwayson_scripts[a]": "1", "lora[ink]": "0.5"}
    async with client_with(unknown_fields="ignore") as client:
        response = await client.post("/v1/images/edits", data=fields, files=files)
        [warning] = warnings_of(response)
        assert all(name in warning for name in ("cfg_scale", "control", "alwayson_scripts"))
        assert "lora" not in warning
        fields["mask"] = "no file"
        response = await client.post("/v1/images/edits", data=fields, files=files)
        assert error_of(response, 400)["param"] == "mask"


async def send(call: Call, **gateway: Any) -> httpx.Response:
    colors = {"mask": "transparent"}
    files = [(name, ("a.png", png(colors.get(name, "blue")))) for name in call.files]
    async with client_with(**gateway) as client:
        if not files:
            return await post(client, call.fields)
        return await client.post("/v1/images/edits", data=call.fields, files=files)


async def result_of(call: Call) -> str:
    """Send a call, with an alias if it needs one, and return what came of it."""
    response, result = await send(call), "works"
    if response.status_code == 404:
        aliases = dict.fromkeys(("gpt-image-*", "dall-e-*"), CONFIG.model.id)
        response, result = await send(call, model_aliases=aliases), "with an alias"
    if response.status_code != 200:
        assert "2 images are given; SomePipeline takes at most 1" in response.text
        return str(response.status_code)
    warnings = warnings_of(response)
    assert [text.split()[0] for text in warnings] == list(call.warnings)
    [image] = response.json()["data"]
    return result if call.reads in image else f"no `{call.reads}`"


async def test_programs_get_their_images_or_a_clear_error() -> None:
    found: dict[str, set[tuple[str, str]]] = {}
    for call in CALLS:
        found.setdefault(call.program, set()).add((call.kind, await result_of(call)))
    own = {("generate", "works"), ("edit", "works"), ("edit of two images", "400")}
    aliased = {(kind, "with an alias" if result == "works" else result) for kind, result in own}
    assert found == {
        "Open WebUI": own,
        "LibreChat": aliased,
        "n8n": aliased,
        "LangChain": {("generate", "no `url`")},  # without a storage
        "Vercel AI SDK": own,
        "InvokeAI": own,
    }


PREFLIGHT = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


async def test_listed_origins_may_call_the_api_from_a_browser() -> None:
    asked = {"origin": ORIGIN, "sec-fetch-site": "cross-site"}
    for keys, key in ((None, {}), (KEY, {"authorization": "Bearer k"})):
        async with client_with(keys, cors_origins=[ORIGIN]) as client:
            allowed = await client.options("/v1/images/generations", headers=PREFLIGHT)
            assert allowed.status_code == 200
            assert allowed.headers["access-control-allow-origin"] == ORIGIN
            assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
            response = await client.post(
                "/v1/images/generations", json={"prompt": "x"}, headers=asked | key
            )
            assert response.status_code == 200
            assert response.headers["access-control-allow-origin"] == ORIGIN
            assert "Retry-After" in response.headers["access-control-expose-headers"]
            assert "access-control-allow-credentials" not in response.headers
            wrong = await client.post("/v1/images/generations", json={}, headers=asked | key)
            assert error_of(wrong, 400)["param"] == "prompt"
            assert wrong.headers["access-control-allow-origin"] == ORIGIN  # or no page reads it


async def test_other_origins_may_not() -> None:
    other = {"origin": "https://evil.example.com", "sec-fetch-site": "cross-site"}
    async with client_with(cors_origins=[ORIGIN]) as client:
        refused = await client.options("/v1/images/generations", headers=PREFLIGHT | other)
        assert "access-control-allow-origin" not in refused.headers
        response = await client.post("/v1/images/generations", json={"prompt": "x"}, headers=other)
        assert error_of(response, 403)["code"] == "cross_site"
        assert "access-control-allow-origin" not in response.headers
    async with client_with(cors_origins=["*"]) as client:
        response = await client.get("/v1/models", headers=other)
        assert response.headers["access-control-allow-origin"] == "*"
        assert json.loads(response.text)["object"] == "list"
