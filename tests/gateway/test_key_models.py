"""Keys that may use some of several models: to their requests there are no others."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.gateway import auth
from serve_app.gateway.auth import KeyRing, digest
from serve_app.metrics.registry import GATEWAY
from tests.gateway.conftest import error_of, post
from tests.gateway.test_several_models import PNG, Served, config_of, serving

pytestmark = pytest.mark.anyio

BODY: dict[str, Any] = {"prompt": "x", "size": "64x64"}
RESPONSE: dict[str, Any] = {
    "input": "x",
    "tools": [{"type": "image_generation", "size": "64x64"}],
}


def entry(name: str, models: str = "") -> str:
    return f"- {{name: {name}, sha256: {digest(f'sk-{name}')}{models}}}\n"


KEYS = (
    entry("all")
    + entry("others", ", models: [edits, org/large]")
    + entry("one", ", models: [small]")
    + entry("gone", ", models: [removed]")
)


@asynccontextmanager
async def served_to(key: str, **gateway: Any) -> AsyncIterator[Served]:
    """Serve the three models to a client with a key."""
    async with serving(config_of(**gateway), KEYS) as served:
        served.client.headers["authorization"] = f"Bearer sk-{key}"
        yield served


async def sent_by_each_api(client: httpx.AsyncClient, name: str | None) -> list[httpx.Response]:
    """Send a request for a model by each API that generates images."""
    model = {} if name is None else {"model": name}
    settings = {} if name is None else {"override_settings": {"sd_model_checkpoint": name}}
    sdapi = {"prompt": "x", "width": 64, "height": 64} | settings
    return [
        await post(client, BODY | model),
        await post(client, BODY | model | {"stream": True}),
        await client.post("/v1/images/edits", data=BODY | model, files={"image": PNG}),
        await client.post("/v1/responses", json=RESPONSE | model),
        await client.post("/sdapi/v1/txt2img", json=sdapi),
    ]


@pytest.mark.parametrize(
    ("key", "name", "received"),
    [
        ("others", None, [0, 0, 5]),
        ("others", "edits", [0, 0, 5]),
        ("others", "org/large", [0, 5, 0]),
        ("others", "dall-e-3", [0, 5, 0]),
        ("one", None, [5, 0, 0]),
        ("one", "dall-e-3", [5, 0, 0]),  # by the alias dall-e-*: its own model has gone
        ("all", None, [5, 0, 0]),
        ("all", "edits", [0, 0, 5]),
    ],
)
async def test_a_key_reaches_its_models(key: str, name: str | None, received: list[int]) -> None:
    async with served_to(key) as served:
        answers = await sent_by_each_api(served.client, name)
        assert [answer.status_code for answer in answers] == [200] * 5, answers[-1].text
        assert served.received == received


@pytest.mark.parametrize("name", ["small", "dall-e-2", "other"])
async def test_another_model_is_one_that_is_not_here(name: str) -> None:
    async with served_to("others") as served:
        for answer in await sent_by_each_api(served.client, name):
            assert answer.status_code == 404
            error = answer.json()["error"]
            assert error["code"] == "model_not_found"
            assert error["message"] == (
                f"no model {name!r} here; there are 'edits', 'org/large', also as 'dall-e-3'."
            )
        assert served.received == [0, 0, 0]
        assert all(not backend.described_for for backend in served.backends.values())


async def test_a_key_of_one_model_starts_none_by_an_unknown_name() -> None:
    async with served_to("one") as served:
        for name in ("edits", "other"):
            for answer in await sent_by_each_api(served.client, name):
                assert answer.status_code == 404
                assert "there is 'small', also as 'dall-e-*'." in answer.json()["error"]["message"]
                assert "large" not in answer.text
        assert served.backends["small"].described_for == []


async def test_any_name_means_the_first_model_of_the_key() -> None:
    async with served_to("others", any_model=True) as served:
        for name in ("small", "other"):
            answer = await post(served.client, BODY | {"model": name})
            assert f"model is {name!r}; the model here is 'edits'." in answer.json()["warnings"]
        assert served.received == [0, 0, 2]


async def test_lists_have_the_models_of_the_key_in_the_order_of_its_entry() -> None:
    async with served_to("others") as served:
        listed = await served.client.get("/v1/models")
        assert [one["id"] for one in listed.json()["data"]] == ["edits", "org/large"]
        assert "small" not in listed.text
        found = await served.client.get("/v1/models/dall-e-3")
        assert found.json()["id"] == "org/large"
        hidden = await served.client.get("/v1/models/small")
        assert "there are 'edits', 'org/large'" in error_of(hidden, 404)["message"]
        checkpoints = await served.client.get("/sdapi/v1/sd-models")
        assert [one["title"] for one in checkpoints.json()] == ["edits", "org/large"]
        options = await served.client.get("/sdapi/v1/options")
        assert options.json()["sd_model_checkpoint"] == "edits"
        assert served.backends["small"].described_for == []
        served.backends["edits"].described_for.clear()
        assert (await served.client.get("/sdapi/v1/samplers")).status_code == 200
        assert served.backends["edits"].described_for == [None]
        for checkpoint, status in (("edits", 200), ("org/large", 400), ("small", 404)):
            body = {"sd_model_checkpoint": checkpoint}
            answer = await served.client.post("/sdapi/v1/options", json=body)
            assert answer.status_code == status
            assert "dall-e-*" not in answer.text


async def test_what_needs_no_key_names_no_model() -> None:
    async with serving(config_of(), KEYS) as served:
        for path in ("/openapi.json", "/docs", "/"):
            answer = await served.client.get(path)
            assert answer.status_code == 200
            assert "org/large" not in answer.text


async def test_a_key_without_a_model_of_this_server_has_a_clear_answer() -> None:
    for options in ({}, {"any_model": True}):
        async with served_to("gone", **options) as served:
            for name in (None, "small", "removed"):
                for answer in await sent_by_each_api(served.client, name):
                    assert answer.status_code == 404
                    error = answer.json()["error"]
                    assert error["code"] == "model_not_found"
                    assert error["message"].startswith("this API key may use no model")
            listed = await served.client.get("/v1/models")
            assert listed.json()["data"] == []
            assert (await served.client.get("/sdapi/v1/samplers")).status_code == 404
            assert (await served.client.get("/sdapi/v1/options")).status_code == 404
            assert (await served.client.get("/sdapi/v1/sd-models")).json() == []


async def test_links_by_default_follow_the_first_model_of_the_key(tmp_path: Path) -> None:
    storage = {"url": tmp_path.as_uri(), "default_for": ["edits"]}
    for key, field in (("others", "url"), ("all", "b64_json")):
        async with served_to(key, storage=storage) as served:
            answer = await post(served.client, BODY)
            assert answer.status_code == 200, answer.text
            assert answer.json()["data"][0].get(field)


async def test_a_request_counts_for_the_model_of_its_key() -> None:
    def counted(model: str) -> float:
        labels = {"model": model, "key": "others", "priority": "interactive"}
        value = GATEWAY.get_sample_value(
            "diffusion_serve_requests_total", labels | {"outcome": "completed"}
        )
        assert value is not None
        return value

    async with served_to("others") as served:
        before = counted("edits"), counted("small")
        assert (await post(served.client, BODY)).status_code == 200
        assert (counted("edits"), counted("small")) == (before[0] + 1, before[1])


async def test_the_models_of_a_key_change_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auth, "REREAD_EVERY_S", 0.0)
    path = tmp_path / "keys.yaml"

    def models_after(text: str) -> tuple[str, ...] | None:
        path.write_text(text)
        os.utime(path, (len(text), len(text)))  # clocks of file systems are coarse
        key = keys.recognise("Bearer sk-app")
        assert key is not None
        return key.models

    path.write_text(entry("app"))
    keys = KeyRing(path, None, ["small", "edits"])
    assert keys.enter(keys.recognise("Bearer sk-app")).models is None
    assert models_after(entry("app", ", models: [small]")) == ("small",)
    assert caplog.text == ""
    assert models_after(entry("app", ", models: [dall-e-3, small]")) == ("dall-e-3", "small")
    assert (
        "the API key 'app' may use 'dall-e-3', and there is no model with this id: the ids are "
        "'small', 'edits'." in caplog.text
    )
    assert models_after(entry("app", ", models: []")) == ("dall-e-3", "small")
    assert "0.models" in caplog.text
