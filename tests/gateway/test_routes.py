"""The HTTP API in front of a fake backend: requests and responses."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from serve_app.config.gateway import GatewayConfig
from serve_app.config.models import ModelConfig
from serve_app.errors import (
    DiffusionServeError,
)
from serve_app.gateway.auth import KeyRing
from serve_app.gateway.image_request import ImageGenerationRequest
from serve_app.gateway.routes import create_api
from serve_app.protocol.params import MAX_SEED, GenerationParams
from tests.fakes.backend import CONFIG, INFO, FakeBackend
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
            "acceleration": "fast",
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
    sent = GenerationParams("a cat", 7, "dog", 48, 32, 9, 3.0, acceleration="fast")
    assert backend.received == [sent]


async def test_the_model_names_adapters_that_fit_in_part(client: httpx.AsyncClient) -> None:
    [model] = (await client.get("/v1/models")).json()["data"]
    assert model["loras"] == ["pixel", "ink"]
    assert model["partial_loras"] == {"ink": "2 of its 4 tensors are used"}


async def test_the_model_names_noise_schedulers_that_are_not_offered(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    [model] = (await client.get("/v1/models")).json()["data"]
    assert model["schedulers"] == ["euler", "ddim"]
    unavailable = model["unavailable_schedulers"]
    assert unavailable["euler"] == {"image-to-image": "it adds too much noise"}
    assert set(unavailable["pndm"]) == set(model["tasks"])
    response = await post(client, {"prompt": "x", "scheduler": "pndm"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "scheduler"
    assert "it gives values that are not finite; use one of euler, ddim." in error["message"]
    assert backend.received == []


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
    assert (model["default_steps"], model["default_acceleration"]) == (20, "none")
    assert model["quality_steps"] == {"low": 10, "medium": 20, "high": 40, "xhigh": 50, "max": 50}
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
        ({"quality": "standard"}, "medium", 20),
        ({"quality": "hd"}, "high", 40),
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


@pytest.mark.parametrize(
    ("change", "steps", "level"),
    [
        ({"quality": "low"}, 20, "fast"),
        ({"quality": "low", "acceleration": "balanced"}, 20, "balanced"),
        ({"quality": "low", "num_inference_steps": 7}, 7, "none"),
        ({"quality": "medium"}, 20, "none"),
    ],
)
async def test_low_quality_may_mean_extrapolated_calls_instead_of_fewer_steps(
    backend: FakeBackend, change: dict[str, Any], steps: int, level: str
) -> None:
    backend.info = replace(INFO, low_quality_acceleration="fast")
    api = create_api(CONFIG, backend, KeyRing(None, None))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(api), base_url="http://test"
    ) as client:
        [model] = (await client.get("/v1/models")).json()["data"]
        assert model["low_quality_acceleration"] == "fast"
        assert model["quality_steps"]["low"] == 20
        await post(client, {"prompt": "x"} | change)
    [received] = backend.received
    assert (received.num_inference_steps, received.acceleration) == (steps, level)


@pytest.mark.usefixtures("old")
async def test_the_answer_has_usage_and_timings(client: httpx.AsyncClient) -> None:
    answer = (await post(client, {"prompt": "x", "n": 2, "size": "48x24"})).json()
    assert answer["usage"] == {
        "input_tokens": 14,
        "input_tokens_details": {"text_tokens": 14, "image_tokens": 0},
        "output_tokens": 12,  # 3 x 2 squares of 16 pixels, twice
        "output_tokens_details": {"text_tokens": 0, "image_tokens": 12},
        "total_tokens": 26,
    }
    timings = answer["timings"]
    assert (timings["encode_s"], timings["denoise_s"], timings["decode_s"]) == (0.0625, 1.0, 0.125)
    assert timings["total_s"] > 0
    assert (timings["denoiser_calls"], timings["extrapolated_calls"]) == (8, 12)
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


async def test_the_deadline_also_limits_the_wait_for_the_model(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    assert (await post(client, {"prompt": "x", "deadline_s": 10})).status_code == 200
    assert (await post(client, {"prompt": "x"})).status_code == 200
    assert backend.described_for == [10.0, None]


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


async def test_when_one_of_n_images_fails_the_others_are_cancelled(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.slow_seed = 1
    backend.error = DiffusionServeError("broken")
    error_of(await post(client, {"prompt": "x", "n": 2, "seed": 1}), 500)
    assert backend.cancelled == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_the_size_in_the_answer_is_that_of_the_image(
    client: httpx.AsyncClient, backend: FakeBackend, stream: bool
) -> None:
    """Some pipelines, such as that of FLUX.1 Kontext, set the number of pixels themselves."""
    backend.size_px = (32, 16)
    body = {"prompt": "x", "size": "64x32", "stream": stream}
    response = await post(client, body)
    line = response.text.split("data: ")[-1] if stream else response.text
    answer = json.loads(line.splitlines()[0])
    file = answer if stream else answer["data"][0]
    assert decoded(file["b64_json"]).size == (32, 16)
    assert answer["size"] == "32x16"
    assert answer["usage"]["output_tokens"] == 2
    assert answer["warnings"] == [
        "size is 32x16, not 64x32: the model's pipeline sets the number of pixels itself.",
        "a warning",
    ]
    backend.size_px = None
    response = await post(client, body)
    assert "sets the number" not in response.text
