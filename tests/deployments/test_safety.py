"""Flagged images, from the safety checker in the model's folder to the answer."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import ImageChops

from serve_app.config.gateway import GatewayConfig, Safety
from serve_app.config.models import AppConfig, EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.gateway.auth import KeyRing
from serve_app.gateway.routes import create_api
from serve_app.metrics.registry import ENGINE
from tests.deployments.test_generator import Replica
from tests.gateway.conftest import decoded, error_of
from tests.safety_checkers import FLAGS_EVERYTHING, FLAGS_NOTHING, save_with_checker

pytestmark = pytest.mark.anyio

BODY: dict[str, Any] = {"prompt": "a red circle", "seed": 3, "num_inference_steps": 2}

Start = Callable[[float, Safety], Engine]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start engines for a checker's threshold and a mode, each once."""
    folder = tmp_path_factory.mktemp("checked")
    models: dict[float, ModelConfig] = {}
    engines: dict[tuple[float, Safety], Engine] = {}
    with ExitStack() as stack:

        def started(threshold: float, safety: Safety) -> Engine:
            if threshold not in models:
                models[threshold] = save_with_checker(folder / str(threshold), threshold)
            if (threshold, safety) not in engines:
                # The profile of the first start: certificates hold for every checker and mode.
                config = EngineConfig(profile_path=str(folder / "profile.json"))
                engine = Engine.load(models[threshold], config, safety)
                engines[threshold, safety] = stack.enter_context(engine)
            return engines[threshold, safety]

        yield started


def client_of(engine: Engine, safety: Safety) -> httpx.AsyncClient:
    config = AppConfig(model=ModelConfig(id="checked"), gateway=GatewayConfig(safety=safety))
    api = create_api(config, Replica(engine), KeyRing(None, None))
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def generate(engine: Engine, safety: Safety, **fields: Any) -> httpx.Response:
    async with client_of(engine, safety) as client:
        return await client.post("/v1/images/generations", json=BODY | fields, timeout=240)


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    lines = response.text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ")]


def flagged_so_far() -> float:
    return (
        ENGINE.get_sample_value("diffusion_serve_images_flagged_total", {"model": "checked"}) or 0
    )


async def test_a_flagged_image_is_returned_as_generated_and_named(start: Start) -> None:
    before = flagged_so_far()
    response = await generate(start(FLAGS_EVERYTHING, "flag"), "flag", n=2)
    assert response.status_code == 200
    body = response.json()
    unchecked = (await generate(start(FLAGS_NOTHING, "flag"), "flag", n=2)).json()
    for image, other in zip(body["data"], unchecked["data"], strict=True):
        # Two requests may share calls or not, which rounds differently.
        difference = ImageChops.difference(*map(decoded, (image["b64_json"], other["b64_json"])))
        assert all(high <= 1 for _, high in difference.getextrema())
        assert decoded(image["b64_json"]).getextrema() != ((0, 0),) * 3, "it is not black"
    assert [image["safety"] for image in body["data"]] == [{"flagged": True}] * 2
    first, second = body["warnings"]
    assert "safety checker flagged the image with seed 3" in first
    assert "safety checker flagged the image with seed 4" in second
    assert [image["safety"] for image in unchecked["data"]] == [{"flagged": False}] * 2
    assert unchecked["warnings"] == []
    assert flagged_so_far() == before + 2


async def test_a_stream_names_it_too(start: Start) -> None:
    engine = start(FLAGS_EVERYTHING, "flag")
    fields = {"stream": True, "partial_images": 1, "num_inference_steps": 4}
    partial, completed = events_of(await generate(engine, "flag", **fields))
    assert partial["type"] == "image_generation.partial_image"
    assert completed["type"] == "image_generation.completed"
    assert completed["safety"] == {"flagged": True}
    assert "flagged the image with seed 3" in completed["warnings"][0]


@pytest.mark.parametrize("n", [1, 2])
async def test_a_blocked_image_is_the_error_of_openai(start: Start, n: int) -> None:
    before = flagged_so_far()
    error = error_of(await generate(start(FLAGS_EVERYTHING, "block"), "block", n=n), 400)
    assert error["code"] == "content_policy_violation"
    assert error["type"] == "invalid_request_error"
    assert error["param"] is None
    assert "safety checker flagged the image" in error["message"]
    assert flagged_so_far() > before


async def test_openais_client_raises_its_own_error(start: Start) -> None:
    async with client_of(start(FLAGS_EVERYTHING, "block"), "block") as http:
        client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=http)
        with pytest.raises(openai.BadRequestError) as raised:
            await client.images.generate(prompt="a red circle")
    assert raised.value.code == "content_policy_violation"


async def test_no_preview_of_a_blocked_image_is_sent(start: Start) -> None:
    engine = start(FLAGS_EVERYTHING, "block")
    fields = {"stream": True, "partial_images": 3, "num_inference_steps": 8}
    [event] = events_of(await generate(engine, "block", **fields))
    assert event["error"]["code"] == "content_policy_violation"


async def test_blocking_passes_other_images_without_previews(start: Start) -> None:
    engine = start(FLAGS_NOTHING, "block")
    fields = {"stream": True, "partial_images": 3, "num_inference_steps": 8}
    [event] = events_of(await generate(engine, "block", **fields))
    assert event["type"] == "image_generation.completed"
    assert event["safety"] == {"flagged": False}
    [warning] = event["warnings"]
    assert "gateway.safety is 'block'" in warning


async def test_without_the_checker_nothing_is_said(start: Start) -> None:
    engine = start(FLAGS_EVERYTHING, "off")
    body = (await generate(engine, "off")).json()
    assert body["data"][0]["safety"] is None
    assert body["warnings"] == []
    unchecked = (await generate(start(FLAGS_NOTHING, "flag"), "flag")).json()
    assert body["data"][0]["b64_json"] == unchecked["data"][0]["b64_json"]


@pytest.mark.parametrize(("safety", "expected"), [("flag", True), ("block", True), ("off", False)])
async def test_the_model_says_what_is_checked(start: Start, safety: Safety, expected: bool) -> None:
    async with client_of(start(FLAGS_EVERYTHING, safety), safety) as client:
        [model] = (await client.get("/v1/models")).json()["data"]
    assert model["safety"] == safety
    assert model["safety_checker"] is expected
    assert "image-to-image" in model["tasks"]


async def test_an_edit_is_checked(start: Start, tmp_path: Path) -> None:
    """Pipelines of other tasks share the components: their checkers are set aside as well."""
    engine = start(FLAGS_EVERYTHING, "flag")
    made = (await generate(start(FLAGS_NOTHING, "flag"), "flag")).json()["data"][0]["b64_json"]
    file = tmp_path / "a.png"
    decoded(made).save(file)
    async with client_of(engine, "flag") as client:
        response = await client.post(
            "/v1/images/edits",
            data={"prompt": "a red circle", "seed": "1", "num_inference_steps": "4"},
            files={"image": ("a.png", file.read_bytes())},
            timeout=240,
        )
    [image] = response.json()["data"]
    assert image["safety"] == {"flagged": True}
    assert decoded(image["b64_json"]).getextrema() != ((0, 0),) * 3
