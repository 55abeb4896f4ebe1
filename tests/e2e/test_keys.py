"""A server that asks for keys, below a route prefix, as OpenAI's client meets it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from serve_app.config.environment import KEYS_VARIABLE
from serve_app.gateway.auth import digest
from tests.e2e.conftest import demo_config, free_port, start_serve
from tests.waiting import wait_until

pytestmark = pytest.mark.serve

KEYS = f"""
- {{name: plain, sha256: {digest("sk-plain")}}}
- {{name: narrow, sha256: {digest("sk-narrow")}, max_concurrent: 1}}
"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    port = free_port()
    config: Any = demo_config(port)
    config["applications"][0]["route_prefix"] = "/sd"
    running = start_serve(config, {KEYS_VARIABLE: KEYS})
    url = f"http://127.0.0.1:{port}/sd"
    try:
        running.wait_until_ready(url)
        yield url
    finally:
        running.stop()


def client_of(url: str, key: str, retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=retries)


def test_an_unknown_key_is_an_authentication_error(url: str) -> None:
    with client_of(url, "sk-other") as client:
        with pytest.raises(openai.AuthenticationError, match="not known") as caught:
            client.images.generate(prompt="x")
        assert caught.value.code == "invalid_api_key"
    with client_of(url, "sk-plain") as client:
        assert client.images.generate(prompt="x").data


def test_one_too_many_is_a_rate_limit_error_and_a_retry_gets_in(url: str) -> None:
    with (
        client_of(url, "sk-narrow") as client,
        client_of(url, "sk-narrow", retries=60) as patient,
        ThreadPoolExecutor(1) as pool,
    ):
        long = {"num_inference_steps": 200}
        # Whoever looks whether it is refused takes the only place for a moment, too.
        first = pool.submit(patient.images.generate, prompt="x", size="96x96", extra_body=long)  # type: ignore[call-overload]

        def refused() -> openai.RateLimitError | None:
            try:
                client.models.list()
            except openai.RateLimitError as error:
                return error
            return None

        error = wait_until(refused, every_s=0.1, what="a refusal")
        assert error.code == "rate_limit_exceeded"
        assert error.response.headers["retry-after"] == "1"
        assert patient.images.generate(prompt="x").data
        assert first.result().data


def test_a_prefix_opens_nothing_and_is_no_path_by_itself(url: str) -> None:
    key = {"authorization": "Bearer sk-plain"}
    for path in ("/v1/models", "/nothing"):
        assert httpx.get(f"{url}{path}", timeout=20).status_code == 401
    assert httpx.get(f"{url}/v1/models", headers=key, timeout=20).status_code == 200
    for path in ("", "/", "/docs", "/openapi.json", "/health", "/ready"):
        answer = httpx.get(f"{url}{path}", timeout=20, follow_redirects=True)
        assert answer.status_code == 200, path
    # Where no application is, Serve's proxy answers.
    answer = httpx.get(url.replace("/sd", "/v1/models"), headers=key, timeout=20)
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "no such path: /v1/models"
    assert len(answer.headers.get_list("x-request-id")) == 1
