"""The HTTP API in front of a painter that paints at once: what goes in, what comes out."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from PIL import Image

from serve_app.config import AppConfig, EngineConfig, LimitsConfig, ModelConfig
from serve_app.engine.encoding import EncodedImage, ImageFormat, encode
from serve_app.engine.params import MAX_SEED, GenerationParams, ModelInfo
from serve_app.errors import DiffusionServeError, GenerationFailed, Unavailable
from serve_app.gateway.routes import create_api

LIMITS = LimitsConfig(max_pixels=128 * 128, max_steps=50, max_images=4, max_body_bytes=2_000)
CONFIG = AppConfig(model=ModelConfig(id="demo"), engine=EngineConfig(limits=LIMITS))
INFO = ModelInfo(
    id="demo",
    pipeline="SomePipeline",
    dtype="float32",
    device="cpu",
    default_width=64,
    default_height=64,
    size_multiple=8,
    default_steps=20,
    takes_negative_prompt=True,
    tasks=("text-to-image", "image-to-image"),
    default_strengths={"image-to-image": 0.5},
    noise_schedulers=("euler", "ddim"),
    loras=("pixel", "ink"),
    sharing="batched",
    sharing_difference=1e-6,
    sharing_note="",
    limits=LIMITS,
)


class FakePainter:
    """Paints plain pictures and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[GenerationParams] = []
        self.error: Exception | None = None
        self.ready = True
        self.cancelled = 0
        self.slow_seed: int | None = None

    async def paint(self, params: GenerationParams, image_format: ImageFormat) -> EncodedImage:
        self.asked.append(params)
        if params.seed == self.slow_seed:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if self.error is not None:
            raise self.error
        assert params.width is not None
        assert params.height is not None
        image = Image.new("RGB", (params.width, params.height), "red")
        return EncodedImage(encode(image, image_format), params.seed, *image.size)

    async def describe(self) -> ModelInfo:
        await self.check_ready()
        return INFO

    async def check_ready(self) -> None:
        if not self.ready:
            raise Unavailable("no replica is ready yet")


@pytest.fixture
def painter() -> FakePainter:
    return FakePainter()


@pytest.fixture
async def client(painter: FakePainter) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_api(CONFIG, painter), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as session:
        yield session


pytestmark = pytest.mark.anyio


async def _post(client: httpx.AsyncClient, body: object) -> httpx.Response:
    return await client.post("/v1/images/generations", json=body)


def _error(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, after checking that it has OpenAI's shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
async def test_a_picture_comes_back_in_the_wanted_format(
    client: httpx.AsyncClient, painter: FakePainter, image_format: str
) -> None:
    response = await _post(
        client,
        {
            "prompt": "a cat",
            "model": "demo",
            "size": "48x32",
            "seed": 7,
            "negative_prompt": "dog",
            "num_inference_steps": 9,
            "guidance_scale": 3,
            "output_format": image_format,
            "response_format": "b64_json",
        },
    )
    assert response.status_code == 200, response.text
    body = response.json()
    [data] = body["data"]
    image = Image.open(io.BytesIO(base64.b64decode(data["b64_json"])))
    assert image.format == image_format.upper()
    assert image.size == (48, 32)
    assert (body["size"], body["output_format"], data["seed"]) == ("48x32", image_format, 7)
    assert painter.asked == [GenerationParams("a cat", 7, "dog", 48, 32, 9, 3.0)]


async def test_defaults_are_the_models_and_the_seed_is_drawn(
    client: httpx.AsyncClient, painter: FakePainter
) -> None:
    first, second = [(await _post(client, {"prompt": "x"})).json() for _ in range(2)]
    assert first["size"] == "64x64"
    assert first["data"][0]["seed"] != second["data"][0]["seed"]
    assert painter.asked[0].num_inference_steps == 20


async def test_n_pictures_have_seeds_of_their_own(
    client: httpx.AsyncClient, painter: FakePainter
) -> None:
    response = await _post(client, {"prompt": "x", "n": 4, "seed": MAX_SEED - 1})
    seeds = [data["seed"] for data in response.json()["data"]]
    assert len(set(seeds)) == 4
    assert seeds[0] == MAX_SEED - 1
    assert all(0 <= seed <= MAX_SEED for seed in seeds)


async def test_curl_without_a_content_type_is_understood(client: httpx.AsyncClient) -> None:
    response = await client.post(
        "/v1/images/generations",
        content='{"prompt": "x"}',
        headers={"content-type": "application/x-www-form-urlencoded"},
    )
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("change", "param", "allowed"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": None}, "prompt", "string"),
        ({"prompt": 3}, "prompt", "string"),
        ({"n": 0}, "n", "from 1 to 4"),
        ({"n": 5}, "n", "from 1 to 4"),
        ({"n": "2"}, "n", "integer"),
        ({"n": True}, "n", "integer"),
        ({"size": "64"}, "size", "WIDTHxHEIGHT"),
        ({"size": "60x64"}, "size", "multiples of 8"),
        ({"size": "0x0"}, "size", "multiples of 8"),
        ({"size": "136x128"}, "size", "at most 16384"),
        ({"size": "٦٤x64"}, "size", "WIDTHxHEIGHT"),
        ({"num_inference_steps": 0}, "num_inference_steps", "from 1 to 50"),
        ({"num_inference_steps": 51}, "num_inference_steps", "from 1 to 50"),
        ({"num_inference_steps": 2.5}, "num_inference_steps", "integer"),
        ({"guidance_scale": -1}, "guidance_scale", "from 0 to 100"),
        ({"guidance_scale": "7"}, "guidance_scale", "number"),
        ({"seed": -1}, "seed", f"from 0 to {MAX_SEED}"),
        ({"seed": 2**63}, "seed", f"from 0 to {MAX_SEED}"),
        ({"seed": 10**40}, "seed", f"from 0 to {MAX_SEED}"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"negative_prompt": []}, "negative_prompt", "string"),
        ({"quality": "hd"}, "quality", "unknown field"),
    ],
)
async def test_bad_fields_are_named_with_what_is_allowed(
    client: httpx.AsyncClient,
    painter: FakePainter,
    change: dict[str, Any],
    param: str,
    allowed: str,
) -> None:
    error = _error(await _post(client, {"prompt": "x"} | change), 400)
    assert error["param"] == param
    assert param in error["message"]
    assert allowed in error["message"]
    assert error["type"] == "invalid_request_error"
    assert painter.asked == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nope",
        b"[1]",
        b'"x"',
        b"\xff\xfe",
        b'{"prompt": "x"',
        b"[" * 1_500,
        b'{"prompt":"\\ud800"}',
    ],
    ids=repr,
)
async def test_what_is_not_a_json_object_is_a_400(
    client: httpx.AsyncClient, content: bytes
) -> None:
    error = _error(await client.post("/v1/images/generations", content=content), 400)
    assert "JSON" in error["message"]


async def test_infinities_are_refused(client: httpx.AsyncClient) -> None:
    for number in ("NaN", "Infinity", "1e999"):
        content = f'{{"prompt": "x", "guidance_scale": {number}}}'
        error = _error(await client.post("/v1/images/generations", content=content), 400)
        assert error["param"] == "guidance_scale"


async def test_a_missing_prompt_is_named(client: httpx.AsyncClient) -> None:
    assert _error(await _post(client, {}), 400)["param"] == "prompt"


@pytest.mark.parametrize(
    ("lora", "adapters"),
    [
        (None, ()),
        ("ink", (("ink", 1.0),)),
        ({"pixel": 0.8, "ink": -1}, (("ink", -1.0), ("pixel", 0.8))),
    ],
)
async def test_adapters_are_named_with_or_without_scales(
    client: httpx.AsyncClient, painter: FakePainter, lora: object, adapters: object
) -> None:
    response = await _post(client, {"prompt": "a", "lora": lora})
    assert response.status_code == 200, response.text
    assert painter.asked[0].lora == adapters


async def test_an_unknown_adapter_is_a_404_with_those_there_are(client: httpx.AsyncClient) -> None:
    error = _error(await _post(client, {"prompt": "a", "lora": "oil"}), 404)
    assert error["param"] == "lora"
    assert error["code"] == "lora_not_found"
    assert "pixel, ink" in error["message"]


@pytest.mark.parametrize("lora", [["ink"], {"ink": "1"}, {"ink": 11}, {"ink": None}, 3])
async def test_other_adapters_are_a_400(client: httpx.AsyncClient, lora: object) -> None:
    error = _error(await _post(client, {"prompt": "a", "lora": lora}), 400)
    assert error["param"] is not None
    assert error["param"].startswith("lora")


async def test_another_model_is_a_404(client: httpx.AsyncClient) -> None:
    error = _error(await _post(client, {"prompt": "x", "model": "dall-e"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "'demo'" in error["message"]


async def test_long_bodies_are_refused_whatever_they_claim(
    client: httpx.AsyncClient, painter: FakePainter
) -> None:
    body = json.dumps({"prompt": "x" * 3_000}).encode()

    async def in_pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    for content in (body, in_pieces()):
        error = _error(await client.post("/v1/images/generations", content=content), 413)
        assert "2000 bytes" in error["message"]
    assert painter.asked == []


async def test_unknown_paths_and_methods_have_the_same_shape(client: httpx.AsyncClient) -> None:
    assert "/v2" in _error(await client.get("/v2"), 404)["message"]
    response = await client.get("/v1/images/generations")
    _error(response, 405)
    assert response.headers["allow"] == "POST"


async def test_the_inside_of_a_failure_stays_inside(
    client: httpx.AsyncClient, painter: FakePainter, caplog: pytest.LogCaptureFixture
) -> None:
    failures: list[Exception] = [GenerationFailed("/secret/path"), RuntimeError("/secret/path")]
    for painter.error in failures:
        error = _error(await _post(client, {"prompt": "x"}), 500)
        assert "secret" not in error["message"]
        assert error["type"] == "server_error"
    assert "/secret/path" in caplog.text


async def test_unavailable_says_when_to_come_back(
    client: httpx.AsyncClient, painter: FakePainter
) -> None:
    painter.error = Unavailable("too many requests")
    response = await _post(client, {"prompt": "x"})
    assert _error(response, 503)["message"] == "too many requests"
    assert int(response.headers["retry-after"]) > 0


async def test_health_follows_the_replicas(client: httpx.AsyncClient, painter: FakePainter) -> None:
    assert (await client.get("/health")).json() == {"status": "ok"}
    painter.ready = False
    for path in ("/health", "/v1/models"):
        _error(await client.get(path), 503)
    _error(await _post(client, {"prompt": "x"}), 503)


async def test_models_say_what_they_take(client: httpx.AsyncClient) -> None:
    body = (await client.get("/v1/models")).json()
    assert body["object"] == "list"
    [model] = body["data"]
    assert (model["id"], model["object"]) == ("demo", "model")
    assert (model["size_multiple"], model["max_steps"], model["batching"]) == (8, 50, "on")


async def test_when_one_of_n_fails_the_others_are_dropped(
    client: httpx.AsyncClient, painter: FakePainter
) -> None:
    painter.slow_seed = 1
    painter.error = DiffusionServeError("broken")
    _error(await _post(client, {"prompt": "x", "n": 2, "seed": 1}), 500)
    assert painter.cancelled == 1


async def test_the_description_is_complete(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    operation = paths["/v1/images/generations"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert "num_inference_steps" in schema["properties"]
    assert {"200", "400", "404", "413", "500", "503"} <= operation["responses"].keys()
