"""The page, the documentation and the API's description."""

import base64
import hashlib
import re

import httpx
import pytest

from serve_app.config.gateway import GatewayConfig
from serve_app.gateway import page
from serve_app.gateway.auth import KeyRing
from serve_app.gateway.routes import create_api
from tests.fakes.backend import CONFIG, FakeBackend
from tests.gateway.conftest import error_of

pytestmark = pytest.mark.anyio


async def assert_modules_are_served(client: httpx.AsyncClient, entry: str) -> None:
    """Follow the imports of the page's modules, from the entry."""
    found, pending = set(), [entry]
    while pending:
        path = pending.pop()
        found.add(path)
        response = await client.get(f"/{path}")
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/javascript")
        imports = re.findall(r'^import .* from "\./([^"]+)";$', response.text, re.MULTILINE)
        pending += {f"page/{name}" for name in imports} - found
    assert len(found) == len(page.scripts())


async def test_the_page_loads_only_its_own_style_and_modules(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    response = await client.get("/")
    assert response.status_code == 200
    assert "default-src 'none'" in response.headers["content-security-policy"]
    text = response.text.split("<style>")[1].split("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in response.headers["content-security-policy"]
    assert "script-src 'self'" in response.headers["content-security-policy"]
    [entry] = re.findall(r'entry\.src = "([^"]+)"', response.text)
    await assert_modules_are_served(client, entry)
    error_of(await client.get("/page/style.css"), 404)
    config = CONFIG.model_copy(update={"gateway": GatewayConfig(page=False)})
    api = create_api(config, backend, KeyRing(None, None))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(api), base_url="http://test"
    ) as other:
        error_of(await other.get("/"), 404)


async def test_the_documentation_needs_no_other_host(client: httpx.AsyncClient) -> None:
    text = (await client.get("/docs")).text
    addresses = re.findall(r'(?:src|href)="([^"]+)"', text)
    assert addresses
    for address in addresses:
        assert "//" not in address
        assert (await client.get(f"/{address}")).status_code == 200


async def test_the_description_is_complete(client: httpx.AsyncClient) -> None:
    description = (await client.get("/openapi.json")).json()
    for path, media_type in (
        ("/v1/images/generations", "application/json"),
        ("/v1/images/edits", "multipart/form-data"),
        ("/v1/images/edits", "application/json"),
    ):
        operation = description["paths"][path]["post"]
        schema = operation["requestBody"]["content"][media_type]["schema"]
        assert "$ref" not in str(schema)  # a reference within it would lead nowhere
        for name, field in schema["properties"].items():
            assert "description" in field or "enum" in field, name
        steps = schema["properties"]["num_inference_steps"]["anyOf"][0]
        assert (steps["minimum"], steps["maximum"]) == (1, 50)
        assert {"400", "401", "404", "413", "429", "500", "503", "504"} < operation[
            "responses"
        ].keys()
        assert operation["responses"]["200"]["content"].keys() == {
            "application/json",
            "text/event-stream",
        }
