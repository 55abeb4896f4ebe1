"""A server with API keys below a route prefix, used through OpenAI's client."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from serve_app.config.environment import KEYS_VARIABLE
from serve_app.gateway.auth import digest
from serve_app.gateway.storage.names import ImageName
from tests.fakes.reverse_proxy import stripping_proxy
from tests.serve_process import demo_config, free_port, serving_config
from tests.waiting import wait_until

pytestmark = pytest.mark.serve

KEYS = f"""
- {{name: plain, sha256: {digest("sk-plain")}}}
- {{name: narrow, sha256: {digest("sk-narrow")}, max_concurrent: 1}}
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for images, with an expired one."""
    folder = tmp_path_factory.mktemp("images")
    (folder / ImageName.new("png", -5).text).touch()
    return folder


@pytest.fixture(scope="module")
def url(images: Path) -> Iterator[str]:
    config = demo_config(free_port())
    [application] = config["applications"]
    application["route_prefix"] = "/sd"
    application["args"]["gateway"] = {"storage": {"url": f"file://{images}"}}
    with serving_config(config, {KEYS_VARIABLE: KEYS}) as url:
        yield url


def client_of(url: str, key: str, retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=retries)


def test_an_unknown_key_is_an_authentication_error(url: str) -> None:
    with client_of(url, "sk-other") as client:
        with pytest.raises(openai.AuthenticationError, match="not known") as caught:
            client.images.generate(prompt="x")
        assert caught.value.code == "invalid_api_key"
    with client_of(url, "sk-plain") as client:
        assert client.images.generate(prompt="x").data


def test_a_link_needs_no_key_and_expired_images_are_removed(url: str, images: Path) -> None:
    with client_of(url, "sk-plain") as client:
        [image] = client.images.generate(prompt="x", response_format="url").data or ()
    assert image.url is not None
    assert image.url.startswith(f"{url}/v1/images/files/")
    file = httpx.get(image.url, headers={"sec-fetch-site": "cross-site"}, timeout=20)
    assert (file.status_code, file.headers["content-type"]) == (200, "image/png")
    assert file.content.startswith(b"\x89PNG")
    left = {path.name for path in images.iterdir()} - {"write-check"}
    assert left == {image.url.rpartition("/")[2]}


def test_a_request_above_the_limit_is_a_rate_limit_error_and_a_retry_succeeds(url: str) -> None:
    with (
        client_of(url, "sk-narrow") as client,
        client_of(url, "sk-narrow", retries=60) as patient,
        ThreadPoolExecutor(1) as pool,
    ):
        long = {"num_inference_steps": 200}
        # The probe below takes the only slot for a moment too, so this one retries.
        first = pool.submit(patient.images.generate, prompt="x", size="96x96", extra_body=long)  # type: ignore[call-overload]

        def rejected() -> openai.RateLimitError | None:
            try:
                client.models.list()
            except openai.RateLimitError as error:
                return error
            return None

        error = wait_until(rejected, every_s=0.1, what="a rejection")
        assert error.code == "rate_limit_exceeded"
        assert error.response.headers["retry-after"] == "1"
        assert patient.images.generate(prompt="x").data
        assert first.result().data


def test_a_prefix_exempts_no_path_from_the_keys(url: str) -> None:
    key = {"authorization": "Bearer sk-plain"}
    for path in ("/v1/models", "/nothing"):
        assert httpx.get(f"{url}{path}", timeout=20).status_code == 401
    assert httpx.get(f"{url}/v1/models", headers=key, timeout=20).status_code == 200
    for path in ("", "/", "/docs", "/openapi.json", "/health", "/ready"):
        answer = httpx.get(f"{url}{path}", timeout=20, follow_redirects=True)
        assert answer.status_code == 200, path
    # Outside the prefix, Serve's proxy answers.
    answer = httpx.get(url.replace("/sd", "/v1/models"), headers=key, timeout=20)
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "no such path: /v1/models"
    assert len(answer.headers.get_list("x-request-id")) == 1


def test_all_addresses_stay_below_the_prefix_and_that_of_a_proxy(url: str) -> None:
    origin = url.removesuffix("/sd")
    key = {"authorization": "Bearer sk-plain"}  # only the exact path /docs needs none
    with stripping_proxy("/team", origin) as proxy:
        for base in (url, f"{proxy}/team/sd"):
            docs = httpx.get(f"{base}/docs/", headers=key, timeout=20, follow_redirects=True)
            assert str(docs.url) == f"{base}/docs"
            addresses = re.findall(r"""(?:src|href)="([^"]+)"|url: '([^']+)'""", docs.text)
            found = [docs.url.join("".join(either)) for either in addresses]
            assert len(found) == 4
            page = httpx.get(base, timeout=20, follow_redirects=True)
            assert str(page.url) == f"{base}/"
            found += [page.url.join(re.findall(r'entry\.src = "([^"]+)"', page.text)[0])]
            for address in found:
                assert str(address).startswith(f"{base}/")
                assert httpx.get(address, timeout=20).status_code == 200, address
