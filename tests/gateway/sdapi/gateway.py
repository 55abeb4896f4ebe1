"""A gateway with AUTOMATIC1111's API before a fake backend, and its answers."""

import base64
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
from PIL import Image

from serve_app.config.gateway import GatewayConfig
from serve_app.gateway.auth import KeyRing, digest
from serve_app.gateway.routes import create_api
from serve_app.protocol.params import ModelInfo
from tests.fakes.backend import CONFIG, LIMITS, FakeBackend

KEYS = "\n".join(f"- {{name: {name}, sha256: {digest(f'sk-{name}')}}}" for name in ("a", "b"))
SMALL: dict[str, Any] = {"prompt": "x", "seed": 1}


class Backend(FakeBackend):
    """A backend that offers a spacing of the noise levels."""

    async def describe(self, deadline_s: float | None = None) -> ModelInfo:
        found = await super().describe(deadline_s)
        return replace(found, noise_schedulers=(*found.noise_schedulers, "euler_karras"))


@asynccontextmanager
async def client_of(
    backend: FakeBackend, keys: str | None = None, **gateway: Any
) -> AsyncIterator[httpx.AsyncClient]:
    limits = LIMITS.model_copy(update={"max_body_bytes": 20_000})
    engine = CONFIG.engine.model_copy(update={"limits": limits})
    settings = GatewayConfig(**{"sdapi": True, **gateway})
    config = CONFIG.model_copy(update={"engine": engine, "gateway": settings})
    api = create_api(config, backend, KeyRing(None, keys))
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test/sdapi/v1") as session:
        yield session


async def answered(client: httpx.AsyncClient, path: str = "/txt2img", **body: Any) -> Any:
    """Return a successful answer, with ``info`` parsed and the images decoded."""
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer.keys() == {"images", "parameters", "info"}
    assert isinstance(answer["info"], str)
    files = [Image.open(io.BytesIO(base64.b64decode(image))) for image in answer["images"]]
    return answer | {"info": json.loads(answer["info"]), "files": files}


async def rejected(
    client: httpx.AsyncClient, path: str = "/txt2img", status: int = 400, **body: Any
) -> dict[str, Any]:
    """Return the error of a rejected request, which both kinds of clients must find."""
    response = await client.post(path, json=body)
    assert response.status_code == status, response.text
    answer = response.json()
    assert answer.keys() == {"error", "detail"}
    assert answer["detail"] == answer["error"]["message"]
    error: dict[str, Any] = answer["error"]
    return error


def png_of(*pixels: Any, mode: str = "RGB", size: tuple[int, int] | None = None) -> bytes:
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    buffer = io.BytesIO()
    image.resize(size or (64, 64), Image.Resampling.NEAREST).save(buffer, "png")
    return buffer.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


BLUE = b64(png_of((0, 0, 255)))


def warnings_of(answer: Any) -> str:
    return " ".join(text for text in answer["info"]["warnings"] if text != "a warning")
