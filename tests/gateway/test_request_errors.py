"""Requests that the API rejects, and the errors that it answers."""

import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from serve_app.errors import (
    DeadlineExceeded,
    GenerationFailed,
    Overloaded,
    Unavailable,
)
from serve_app.protocol.params import MAX_SEED
from tests.fakes.backend import FakeBackend
from tests.gateway.conftest import error_of, post

pytestmark = pytest.mark.anyio


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
        ({"quality": "best"}, "quality", "'low', 'medium'"),
        ({"style": "loud"}, "style", "'vivid' or 'natural'"),
        ({"input_fidelity": "low"}, "input_fidelity", "unknown field"),
        ({"stile": None}, "stile", "unknown field"),
        ({"frame_count": 4}, "frame_count", "no animations"),
        ({"response_format": "url"}, "response_format", "'url' is not available"),
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


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "x-gzip", "gzip, identity"])
async def test_a_compressed_body_is_rejected_by_the_name_of_its_header(
    client: httpx.AsyncClient, backend: FakeBackend, encoding: str
) -> None:
    body = gzip.compress(b'{"prompt": "x"}')
    for path, kind in (
        ("generations", "application/json"),
        ("edits", "multipart/form-data; boundary=x"),
    ):
        headers = {"content-encoding": encoding, "content-type": kind}
        response = await client.post(f"/v1/images/{path}", content=body, headers=headers)
        error = error_of(response, 415)
        assert f"Content-Encoding is {encoding!r}" in error["message"]
        assert "without compression" in error["message"]
        assert error["code"] == "unsupported_encoding"
        assert response.headers["accept-encoding"] == "identity"
        assert response.headers["x-should-retry"] == "false"
    assert backend.received == []


async def test_an_encoding_that_changes_nothing_is_accepted(client: httpx.AsyncClient) -> None:
    for encoding in ("identity", "Identity", "", "identity, identity"):
        response = await client.post(
            "/v1/images/generations",
            json={"prompt": "x"},
            headers={"content-encoding": encoding},
        )
        assert response.status_code == 200, response.text


async def test_a_compressed_body_is_documented(client: httpx.AsyncClient) -> None:
    described = (await client.get("/openapi.json")).json()
    for path in ("generations", "edits"):
        response = described["paths"][f"/v1/images/{path}"]["post"]["responses"]["415"]
        assert "Content-Encoding" in response["description"]


async def test_infinities_are_rejected(client: httpx.AsyncClient) -> None:
    for number in ("NaN", "Infinity", "1e999"):
        content = f'{{"prompt": "x", "guidance_scale": {number}}}'
        error = error_of(await client.post("/v1/images/generations", content=content), 400)
        assert error["param"] == "guidance_scale"


async def test_a_missing_prompt_is_named(client: httpx.AsyncClient) -> None:
    assert error_of(await post(client, {}), 400)["param"] == "prompt"


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


async def test_a_generation_that_takes_too_long_is_a_504(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.error = DeadlineExceeded("the image was not done within 30 s; it was cancelled.")
    response = await post(client, {"prompt": "x"})
    assert error_of(response, 504)["code"] == "deadline_exceeded"
    assert response.headers["x-should-retry"] == "false"


async def test_server_errors_name_the_request_id(
    client: httpx.AsyncClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.error = RuntimeError("a bug")
    response = await client.post(
        "/v1/images/generations", json={"prompt": "x"}, headers={"x-request-id": "call-42"}
    )
    assert "call-42" in error_of(response, 500)["message"]
    assert "call-42" in caplog.text
