"""The HTTP API in front of a fake backend: requests and responses."""

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from serve_app.config.models import GatewayConfig, ModelConfig
from serve_app.errors import (
    DeadlineExceeded,
    DiffusionServeError,
    GenerationFailed,
    Overloaded,
    Unavailable,
)
from serve_app.gateway import page
from serve_app.gateway.auth import KeyRing
from serve_app.gateway.routes import create_api
from serve_app.gateway.schemas import ImageGenerationRequest
from serve_app.protocol.params import MAX_SEED, GenerationParams
from tests.fakes.backend import CONFIG, FakeBackend
from tests.gateway.conftest import decoded, error_of, post

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
async def test_an_image_has_the_requested_format(
    client: httpx.AsyncClient, backend: FakeBackend, image_format: str
) -> None:
    response = await post(
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
    image = decoded(data["b64_json"])
    assert image.format == image_format.upper()
    assert image.size == (48, 32)
    assert (body["size"], body["output_format"], data["seed"]) == ("48x32", image_format, 7)
    assert backend.received == [GenerationParams("a cat", 7, "dog", 48, 32, 9, 3.0)]


async def test_defaults_are_the_models_and_the_seed_is_random(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    first, second = [(await post(client, {"prompt": "x"})).json() for _ in range(2)]
    assert first["size"] == "64x64"
    assert first["data"][0]["seed"] != second["data"][0]["seed"]
    assert backend.received[0].num_inference_steps == 20


async def test_each_of_n_images_has_its_own_seed(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    response = await post(client, {"prompt": "x", "n": 4, "seed": MAX_SEED - 1})
    seeds = [data["seed"] for data in response.json()["data"]]
    assert len(set(seeds)) == 4
    assert seeds[0] == MAX_SEED - 1
    assert all(0 <= seed <= MAX_SEED for seed in seeds)


async def test_a_body_without_a_content_type_is_parsed(client: httpx.AsyncClient) -> None:
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
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 5}, "n", "from 1 to 4"),
        ({"n": "2"}, "n", "integer"),
        ({"n": True}, "n", "integer"),
        ({"size": "64"}, "size", "WIDTHxHEIGHT"),
        ({"size": "60x64"}, "size", "multiples of 8"),
        ({"size": "0x0"}, "size", "multiples of 8"),
        ({"size": "136x128"}, "size", "at most 16384"),
        ({"size": "٦٤x64"}, "size", "WIDTHxHEIGHT"),
        ({"num_inference_steps": 0}, "num_inference_steps", "greater than or equal to 1"),
        ({"num_inference_steps": 51}, "num_inference_steps", "from 1 to 50"),
        ({"num_inference_steps": 2.5}, "num_inference_steps", "integer"),
        ({"guidance_scale": -1}, "guidance_scale", "greater than or equal to 0"),
        ({"guidance_scale": "7"}, "guidance_scale", "number"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**63}, "seed", f"less than or equal to {MAX_SEED}"),
        ({"seed": 10**40}, "seed", f"less than or equal to {MAX_SEED}"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"negative_prompt": []}, "negative_prompt", "string"),
        ({"quality": "hd"}, "quality", "'low', 'medium' or 'high'"),
        ({"style": "vivid"}, "style", "unknown field"),
        ({"style": None}, "style", "unknown field"),
        ({"response_format": "url"}, "response_format", "no URLs"),
        ({"background": "transparent"}, "background", "opaque"),
        ({"output_compression": 50}, "output_compression", "leave it out for png"),
        ({"output_format": "jpeg", "output_compression": 101}, "output_compression", "100"),
        ({"deadline_s": 31.0}, "deadline_s", "at most 30"),
        ({"deadline_s": 0}, "deadline_s", "greater than 0"),
        ({"partial_images": 1}, "partial_images", "needs stream"),
        ({"progress": True}, "progress", "needs stream"),
        ({"stream": True, "partial_images": 4}, "partial_images", "3"),
        ({"stream": True, "n": 2}, "n", "one image"),
        ({"strength": 0.5}, "strength", "unknown field"),
    ],
)
async def test_errors_name_the_field_and_the_allowed_values(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    change: dict[str, Any],
    param: str,
    allowed: str,
) -> None:
    response = await post(client, {"prompt": "x"} | change)
    error = error_of(response, 400)
    assert response.headers["x-should-retry"] == "false"
    assert error["param"] == param
    assert param in error["message"]
    assert allowed in error["message"]
    assert error["type"] == "invalid_request_error"
    assert backend.received == []


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
async def test_a_body_that_is_no_json_object_is_a_400(
    client: httpx.AsyncClient, content: bytes
) -> None:
    error = error_of(await client.post("/v1/images/generations", content=content), 400)
    assert "JSON" in error["message"]


async def test_infinities_are_rejected(client: httpx.AsyncClient) -> None:
    for number in ("NaN", "Infinity", "1e999"):
        content = f'{{"prompt": "x", "guidance_scale": {number}}}'
        error = error_of(await client.post("/v1/images/generations", content=content), 400)
        assert error["param"] == "guidance_scale"


async def test_null_means_the_default(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    body = dict.fromkeys(ImageGenerationRequest.model_fields.keys() - {"prompt"})
    response = await post(client, {"prompt": "x"} | body)
    assert response.status_code == 200, response.text
    assert response.json()["output_format"] == "png"
    described = (await client.get("/openapi.json")).json()
    operation = described["paths"]["/v1/images/generations"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    for name in body:
        assert {"type": "null"} in schema["properties"][name]["anyOf"], name


async def test_a_missing_prompt_is_named(client: httpx.AsyncClient) -> None:
    assert error_of(await post(client, {}), 400)["param"] == "prompt"


@pytest.mark.parametrize(
    ("lora", "adapters"),
    [
        (None, ()),
        ("ink", (("ink", 1.0),)),
        ({"pixel": 0.8, "ink": -1}, (("ink", -1.0), ("pixel", 0.8))),
    ],
)
async def test_adapters_are_named_with_or_without_scales(
    client: httpx.AsyncClient, backend: FakeBackend, lora: object, adapters: object
) -> None:
    response = await post(client, {"prompt": "a", "lora": lora})
    assert response.status_code == 200, response.text
    assert backend.received[0].lora == adapters


async def test_an_unknown_adapter_is_a_404_that_names_the_known_ones(
    client: httpx.AsyncClient,
) -> None:
    error = error_of(await post(client, {"prompt": "a", "lora": "oil"}), 404)
    assert error["param"] == "lora"
    assert error["code"] == "lora_not_found"
    assert "pixel, ink" in error["message"]


@pytest.mark.parametrize(
    ("lora", "param"),
    [
        (["ink"], "lora"),
        ({"ink": "1"}, "lora.ink"),
        ({"ink": 11}, "lora"),
        ({"str": None}, "lora.str"),
        (3, "lora"),
    ],
)
async def test_invalid_adapters_are_a_400(
    client: httpx.AsyncClient, lora: object, param: str
) -> None:
    error = error_of(await post(client, {"prompt": "a", "lora": lora}), 400)
    assert error["param"] == param
    assert "dict[" not in error["message"]


async def test_errors_repeat_at_most_a_line_of_the_request(
    client: httpx.AsyncClient,
) -> None:
    long = "x" * 1_500
    for body in ({"prompt": "a", long: 1}, {"prompt": "a", "lora": {long: "1"}}):
        error = error_of(await post(client, body), 400)
        assert len(error["param"]) == 100
        assert len(error["message"]) < 600
    for files in ({long: ("a.png", b"x")}, {"image": ("a.png", b"x")}):
        response = await client.post(
            "/v1/images/edits", data={"prompt": "a", long: ["1", "2"]}, files=files
        )
        error = error_of(response, 400)
        assert len(error["param"]) == 100
        assert len(error["message"]) < 600
    assert len(error_of(await client.get(f"/{long}"), 404)["message"]) < 200


async def test_another_model_is_a_404(client: httpx.AsyncClient) -> None:
    error = error_of(await post(client, {"prompt": "x", "model": "dall-e"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "'demo'" in error["message"]


async def test_long_bodies_are_rejected_whatever_their_header(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    body = json.dumps({"prompt": "x" * 3_000}).encode()

    async def in_pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    for content in (body, in_pieces()):
        error = error_of(await client.post("/v1/images/generations", content=content), 413)
        assert "2000 bytes" in error["message"]
    assert backend.received == []


async def test_unknown_paths_and_methods_have_the_same_error_object(
    client: httpx.AsyncClient,
) -> None:
    assert "/v2" in error_of(await client.get("/v2"), 404)["message"]
    response = await client.get("/v1/images/generations")
    error_of(response, 405)
    assert response.headers["allow"] == "POST"


async def test_details_of_a_failure_are_not_sent(
    client: httpx.AsyncClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    failures: list[Exception] = [GenerationFailed("/secret/path"), RuntimeError("/secret/path")]
    for backend.error in failures:
        error = error_of(await post(client, {"prompt": "x"}), 500)
        assert "secret" not in error["message"]
        assert error["type"] == "server_error"
    assert "/secret/path" in caplog.text


async def test_unavailable_has_a_retry_time(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.error = Unavailable("no replica")
    response = await post(client, {"prompt": "x"})
    assert error_of(response, 503)["message"] == "no replica"
    assert int(response.headers["retry-after"]) > 0
    backend.error = Overloaded("too many requests", retry_after_s=7.2)
    response = await post(client, {"prompt": "x"})
    assert error_of(response, 429)["code"] == "overloaded"
    assert response.headers["retry-after"] == "8"
    assert "x-should-retry" not in response.headers


async def test_readiness_depends_on_replicas_and_liveness_does_not(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    assert (await client.get("/ready")).json() == {"status": "ok"}
    backend.ready = False
    for path in ("/ready", "/v1/models", "/v1/models/demo"):
        response = await client.get(path)
        error_of(response, 503)
        assert int(response.headers["retry-after"]) > 0
    error_of(await post(client, {"prompt": "x"}), 503)
    assert (await client.get("/health")).json() == {"status": "ok"}


async def test_probes_may_use_head_requests(client: httpx.AsyncClient) -> None:
    for path in ("/", "/health", "/ready"):
        response = await client.head(path)
        assert (response.status_code, response.content) == (200, b"")


async def test_models_describe_their_options(client: httpx.AsyncClient) -> None:
    body = (await client.get("/v1/models")).json()
    assert body["object"] == "list"
    [model] = body["data"]
    assert (model["id"], model["object"]) == ("demo", "model")
    assert (model["size_multiple"], model["max_steps"], model["batching"]) == (8, 50, "on")
    assert model["quality_steps"] == {"low": 10, "medium": 20, "high": 40}
    assert (await client.get("/v1/models/demo")).json() == model
    assert error_of(await client.get("/v1/models/sd"), 404)["code"] == "model_not_found"


async def test_model_names_may_have_a_slash(backend: FakeBackend) -> None:
    name = "stabilityai/stable-diffusion-xl-base-1.0"
    config = CONFIG.model_copy(update={"model": ModelConfig(id=name)})
    api = create_api(config, backend, KeyRing(None, None))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(api), base_url="http://test"
    ) as client:
        for path in (name, name.replace("/", "%2F")):
            assert (await client.get(f"/v1/models/{path}")).status_code == 200
        for path in ("", "stabilityai", f"{name}/"):
            error = error_of(await client.get(f"/v1/models/{path}"), 404)
            assert error["code"] == "model_not_found"
        described = (await client.get("/openapi.json")).json()
        assert "/v1/models/{model}" in described["paths"]


@pytest.mark.parametrize(
    ("change", "quality", "steps"),
    [
        ({}, "medium", 20),
        ({"quality": "auto"}, "medium", 20),
        ({"quality": "low"}, "low", 10),
        ({"quality": "high"}, "high", 40),
        ({"quality": "high", "num_inference_steps": 3}, "high", 3),
    ],
)
async def test_quality_sets_the_number_of_steps(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    change: dict[str, Any],
    quality: str,
    steps: int,
) -> None:
    response = await post(client, {"prompt": "x"} | change)
    assert response.json()["quality"] == quality
    assert backend.received[0].num_inference_steps == steps


@pytest.mark.usefixtures("old")
async def test_the_answer_has_usage_and_timings(client: httpx.AsyncClient) -> None:
    answer = (await post(client, {"prompt": "x", "n": 2, "size": "48x24"})).json()
    assert answer["usage"] == {
        "input_tokens": 14,
        "input_tokens_details": {"text_tokens": 14, "image_tokens": 0},
        "output_tokens": 12,  # 3 x 2 squares of 16 pixels, twice
        "total_tokens": 26,
    }
    timings = answer["timings"]
    assert (timings["encode_s"], timings["denoise_s"], timings["decode_s"]) == (0.0625, 1.0, 0.125)
    assert timings["total_s"] > 0
    assert answer["warnings"] == ["a warning"]
    assert answer["background"] == "opaque"


async def test_compression_makes_files_smaller(client: httpx.AsyncClient) -> None:
    lengths = []
    for compression in (5, 100):
        body = {"prompt": "x", "output_format": "jpeg", "output_compression": compression}
        [data] = (await post(client, body)).json()["data"]
        assert decoded(data["b64_json"]).format == "JPEG"
        lengths.append(len(data["b64_json"]))
    assert lengths[0] < lengths[1]


async def test_a_generation_that_takes_too_long_is_a_504(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.error = DeadlineExceeded("the image was not done within 30 s; it was cancelled.")
    response = await post(client, {"prompt": "x"})
    assert error_of(response, 504)["code"] == "deadline_exceeded"
    assert response.headers["x-should-retry"] == "false"


async def test_the_deadline_also_limits_the_wait_for_the_model(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    assert (await post(client, {"prompt": "x", "deadline_s": 10})).status_code == 200
    assert (await post(client, {"prompt": "x"})).status_code == 200
    assert backend.described_for == [10.0, None]


async def test_server_errors_name_the_request_id(
    client: httpx.AsyncClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.error = RuntimeError("a bug")
    response = await client.post(
        "/v1/images/generations", json={"prompt": "x"}, headers={"x-request-id": "call-42"}
    )
    assert "call-42" in error_of(response, 500)["message"]
    assert "call-42" in caplog.text


@pytest.mark.parametrize("logged", [False, True])
async def test_prompts_are_logged_only_if_configured(
    backend: FakeBackend, caplog: pytest.LogCaptureFixture, logged: bool
) -> None:
    caplog.set_level("INFO")
    config = CONFIG.model_copy(update={"gateway": GatewayConfig(log_prompts=logged)})
    api = create_api(config, backend, KeyRing(None, None))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(api, raise_app_exceptions=False), base_url="http://test"
    ) as client:
        await post(client, {"prompt": "something private", "seed": 5})
        await post(client, {"prompt": "something private", "size": "1x1"})
        backend.error = RuntimeError("a bug")
        await post(client, {"prompt": "something private", "seed": 5})
    assert "64x64, 20 steps, seed 5: completed" in caplog.text
    assert "seed 5: internal_error" in caplog.text
    assert ("private" in caplog.text) == logged


async def test_a_disconnect_is_noticed_without_serve(
    backend: FakeBackend,
) -> None:
    """Serve does not notify for clients that send x-request-disconnect-disabled."""
    backend.slow_seed = 1
    body = json.dumps({"prompt": "x", "seed": 1}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        while not backend.received:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    api = create_api(CONFIG, backend, KeyRing(None, None))
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/images/generations",
        "raw_path": b"/v1/images/generations",
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await api(scope, receive, send)  # type: ignore[arg-type]
    assert backend.cancelled == 1


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
    [entry] = re.findall(r'<script type="module" src="([^"]+)">', response.text)
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
        assert address.startswith("/")
        assert (await client.get(address)).status_code == 200


async def test_when_one_of_n_images_fails_the_others_are_cancelled(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.slow_seed = 1
    backend.error = DiffusionServeError("broken")
    error_of(await post(client, {"prompt": "x", "n": 2, "seed": 1}), 500)
    assert backend.cancelled == 1


async def test_the_description_is_complete(client: httpx.AsyncClient) -> None:
    description = (await client.get("/openapi.json")).json()
    for path, media_type in (
        ("/v1/images/generations", "application/json"),
        ("/v1/images/edits", "multipart/form-data"),
    ):
        operation = description["paths"][path]["post"]
        schema = operation["requestBody"]["content"][media_type]["schema"]
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
