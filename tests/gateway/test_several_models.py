"""Several models behind one gateway, each before a fake backend."""

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from serve_app.config.models import AppConfig, parse_app_config
from serve_app.errors import DeadlineExceeded, Unavailable
from serve_app.gateway import model_list
from serve_app.gateway.auth import KeyRing
from serve_app.gateway.model_names import ModelNames
from serve_app.gateway.models import ServedModels
from serve_app.gateway.routes import create_api
from serve_app.metrics.registry import GATEWAY
from tests.fakes.backend import INFO, LIMITS, FakeBackend
from tests.gateway.conftest import error_of, post

pytestmark = pytest.mark.anyio

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJg"
    "gg=="
)


def config_of(**gateway: Any) -> AppConfig:
    limits = LIMITS.model_dump()
    return parse_app_config(
        {
            "engine": {"limits": limits},
            "models": [
                {"id": "small"},
                {
                    "id": "org/large",
                    "engine": {"limits": limits | {"max_steps": 80, "max_images": 1}},
                },
                {"id": "edits"},
            ],
            "gateway": {
                "sdapi": True,
                "model_aliases": {"dall-e-*": "small", "dall-e-3": "org/large"},
            }
            | gateway,
        }
    )


class Served:
    """A gateway before three models."""

    def __init__(self, client: httpx.AsyncClient, backends: dict[str, FakeBackend]) -> None:
        self.client = client
        self.backends = backends

    @property
    def received(self) -> list[int]:
        """Number of images that each model has generated."""
        return [len(backend.received) for backend in self.backends.values()]


@asynccontextmanager
async def serving(config: AppConfig, keys: str | None = None) -> AsyncIterator[Served]:
    backends = {name: FakeBackend() for name in config.ids}
    for one in config.each_model():
        backends[one.model.id].info = replace(INFO, id=one.model.id, limits=one.engine.limits)
    api = create_api(config, list(backends.values()), KeyRing(None, keys))
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as session:
        yield Served(session, backends)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving(config_of()) as found:
        yield found


@pytest.mark.parametrize(
    ("name", "received"),
    [
        (None, [1, 0, 0]),
        ("small", [1, 0, 0]),
        ("org/large", [0, 1, 0]),
        ("edits", [0, 0, 1]),
        ("dall-e-2", [1, 0, 0]),
        ("dall-e-3", [0, 1, 0]),
    ],
)
async def test_a_request_goes_to_its_model(
    served: Served, name: str | None, received: list[int]
) -> None:
    body = {"prompt": "x", "size": "64x64"} | ({} if name is None else {"model": name})
    response = await post(served.client, body)
    assert response.status_code == 200, response.text
    assert response.json()["warnings"] == ["a warning"]
    assert served.received == received


async def test_an_unknown_model_is_answered_with_all_names(served: Served) -> None:
    error = error_of(await post(served.client, {"prompt": "x", "model": "other"}), 404)
    assert error["message"] == (
        "no model 'other' here; there are 'small', 'org/large', 'edits', also as 'dall-e-*', "
        "'dall-e-3'."
    )
    assert error["param"] == "model"
    assert served.received == [0, 0, 0]


async def test_any_name_may_mean_the_first_model() -> None:
    async with serving(config_of(any_model=True)) as served:
        response = await post(served.client, {"prompt": "x", "model": "other", "size": "64x64"})
        assert "model is 'other'; the model here is 'small'." in response.json()["warnings"]
        assert (await post(served.client, {"prompt": "x", "model": "edits"})).status_code == 200
        assert served.received == [1, 0, 1]


async def test_edits_and_streams_go_to_their_model(served: Served) -> None:
    form = {"prompt": "x", "model": "edits", "size": "64x64"}
    edit = await served.client.post("/v1/images/edits", data=form, files={"image": PNG})
    assert edit.status_code == 200, edit.text
    streamed = await post(
        served.client, {"prompt": "x", "model": "org/large", "size": "64x64", "stream": True}
    )
    assert "image_generation.completed" in streamed.text
    assert served.received == [0, 1, 1]


async def test_each_model_has_its_own_limits(served: Served) -> None:
    steps = {"prompt": "x", "num_inference_steps": 70, "size": "64x64"}
    assert (await post(served.client, steps | {"model": "org/large"})).status_code == 200
    assert "50" in error_of(await post(served.client, steps), 400)["message"]
    two = {"prompt": "x", "n": 2, "size": "64x64"}
    assert (await post(served.client, two)).status_code == 200
    assert (
        "n must be from 1 to 1"
        in error_of(await post(served.client, two | {"model": "org/large"}), 400)["message"]
    )
    document = (await served.client.get("/openapi.json")).json()
    body = document["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]
    properties = body["application/json"]["schema"]["properties"]
    assert properties["num_inference_steps"]["anyOf"][0]["maximum"] == 80
    assert properties["n"]["anyOf"][0]["maximum"] == 4


async def test_the_responses_api_goes_to_its_model(served: Served) -> None:
    body: dict[str, Any] = {"input": "x", "tools": [{"type": "image_generation", "size": "64x64"}]}
    response = await served.client.post("/v1/responses", json=body | {"model": "org/large"})
    assert response.status_code == 200, response.text
    assert response.json()["model"] == "org/large"
    assert (await served.client.post("/v1/responses", json=body)).json()["model"] == "small"
    unknown = await served.client.post("/v1/responses", json=body | {"model": "other"})
    assert "there are 'small'" in error_of(unknown, 404)["message"]
    assert served.received == [1, 1, 0]


async def test_sdapi_goes_to_the_model_of_the_checkpoint(served: Served) -> None:
    listed = (await served.client.get("/sdapi/v1/sd-models")).json()
    assert [one["title"] for one in listed] == ["small", "org/large", "edits"]
    options = (await served.client.get("/sdapi/v1/options")).json()
    assert options["sd_model_checkpoint"] == "small"
    body: dict[str, Any] = {"prompt": "x", "width": 64, "height": 64}
    settings = {"override_settings": {"sd_model_checkpoint": "org/large"}}
    answer = await served.client.post("/sdapi/v1/txt2img", json=body | settings)
    assert answer.status_code == 200, answer.text
    assert json.loads(answer.json()["info"])["sd_model_name"] == "org/large"
    assert (await served.client.post("/sdapi/v1/txt2img", json=body)).status_code == 200
    assert served.received == [1, 1, 0]
    options_path, checkpoint = "/sdapi/v1/options", "sd_model_checkpoint"
    assert (await served.client.post(options_path, json={checkpoint: "small"})).status_code == 200
    other = await served.client.post(options_path, json={checkpoint: "edits"})
    assert other.status_code == 400
    assert "override_settings.sd_model_checkpoint" in other.json()["detail"]
    unknown = await served.client.post(options_path, json={checkpoint: "other"})
    assert unknown.status_code == 404


async def test_the_list_has_every_model_with_its_state(served: Served) -> None:
    small, large, edits = served.backends.values()
    large.replicas, large.ready = "at_zero", False
    edits.replicas, edits.ready = "failed", False
    response = await served.client.get("/v1/models")
    assert response.status_code == 200, response.text
    listed = response.json()["data"]
    assert [(one["id"], one["state"]) for one in listed] == [
        ("small", "running"), ("org/large", "at_zero"), ("edits", "failed"),
    ]  # fmt: skip
    assert listed[0]["tasks"] == ["text-to-image", "image-to-image", "inpainting"]
    assert "tasks" not in listed[1]
    assert [one["max_steps"] for one in listed] == [50, 80, 50]
    # No request reached a model without a running replica, which it would start.
    assert (len(small.described_for), large.described_for, edits.described_for) == (1, [], [])
    one = await served.client.get("/v1/models/org/large")
    assert one.json() == listed[1]
    assert (await served.client.get("/v1/models/dall-e-3")).json()["id"] == "org/large"
    error_of(await served.client.get("/v1/models/other"), 404)


async def test_a_model_at_zero_keeps_its_description(served: Served) -> None:
    backend = served.backends["edits"]
    assert (await post(served.client, {"prompt": "x", "model": "edits"})).status_code == 200
    backend.replicas = "at_zero"
    [*_, listed] = (await served.client.get("/v1/models")).json()["data"]
    assert (listed["state"], listed["pipeline"]) == ("at_zero", "SomePipeline")


async def test_a_running_replica_that_does_not_answer_delays_no_list(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_list, "DESCRIBED_WITHIN_S", 0.01)
    served.backends["edits"].answering.clear()
    [*_, listed] = (await served.client.get("/v1/models")).json()["data"]
    assert listed["state"] == "running"
    assert "tasks" not in listed


async def test_no_list_and_no_probe_acts_on_a_guess(served: Served) -> None:
    """A call of a model of which nothing is known could start it."""
    for backend in served.backends.values():
        backend.replicas = "unknown"
        backend.answering.clear()
    listed = (await served.client.get("/v1/models")).json()["data"]
    assert [one["state"] for one in listed] == ["unknown"] * 3
    assert "'small' is unknown" in error_of(await served.client.get("/ready"), 503)["message"]
    served.backends["edits"].replicas = "at_zero"
    assert (await served.client.get("/ready")).status_code == 200


async def test_a_single_model_that_has_described_itself_runs() -> None:
    async with serving(AppConfig()) as served:
        served.backends["demo"].replicas = "unknown"
        [listed] = (await served.client.get("/v1/models")).json()["data"]
        assert listed["state"] == "running"


async def test_a_model_that_does_not_answer_delays_no_probe(served: Served) -> None:
    small, large, edits = served.backends.values()
    small.answering.clear()
    edits.ready, edits.not_ready = False, DeadlineExceeded("too late")
    assert (await served.client.get("/ready")).status_code == 200
    large.replicas, small.replicas = "failed", "starting"
    assert "'edits' is running" in error_of(await served.client.get("/ready"), 503)["message"]


@pytest.mark.parametrize(
    ("states", "answering", "status"),
    [
        (("running", "failed", "starting"), True, 200),
        (("failed", "running", "failed"), True, 200),
        (("running", "failed", "starting"), False, 503),
        (("failed", "at_zero", "failed"), False, 200),
        (("starting", "failed", "starting"), False, 503),
    ],
)
async def test_one_model_that_can_be_served_is_enough_to_be_ready(
    served: Served, states: tuple[Any, ...], answering: bool, status: int
) -> None:
    for backend, state in zip(served.backends.values(), states, strict=True):
        backend.replicas, backend.ready = state, answering
    response = await served.client.get("/ready")
    assert response.status_code == status
    assert (await served.client.get("/health")).status_code == 200
    if status == 503:
        message = error_of(response, 503)["message"]
        assert f"'org/large' is {states[1]}" in message


async def test_a_model_that_fails_does_not_harm_the_others(served: Served) -> None:
    failed = served.backends["org/large"]
    failed.error = Unavailable("the model could not be started; see the server's log.")
    failed.replicas = "failed"
    body = {"prompt": "x", "size": "64x64"}
    response = await post(served.client, body | {"model": "org/large"})
    assert "could not be started" in error_of(response, 503)["message"]
    assert "retry-after" in response.headers
    assert (await post(served.client, body)).status_code == 200


async def test_requests_count_for_their_model(served: Served) -> None:
    def counted(model: str, outcome: str) -> float:
        labels = {"model": model, "key": "anonymous", "priority": "interactive"}
        found = GATEWAY.get_sample_value(
            "diffusion_serve_requests_total", labels | {"outcome": outcome}
        )
        assert found is not None, "it begins at 0"
        return found

    rows = [
        ("small", "model_not_found"), ("org/large", "completed"), ("edits", "completed"),
        ("small", "invalid_value"), ("edits", "invalid_value"),
    ]  # fmt: skip
    before = [counted(*row) for row in rows]
    body = {"prompt": "x", "size": "64x64"}
    await post(served.client, body | {"model": "org/large"})
    await post(served.client, body | {"model": "other"})
    wrong = {"model": "edits", "response_format": "url"}
    error_of(await post(served.client, body | wrong), 400)
    form = {"data": {"prompt": "x"} | wrong, "files": {"image": PNG}}
    error_of(await served.client.post("/v1/images/edits", **form), 400)
    settings = {"override_settings": {"sd_model_checkpoint": "edits"}, "init_images": ["?"]}
    answer = await served.client.post("/sdapi/v1/img2img", json={"prompt": "x"} | settings)
    assert answer.status_code == 400, answer.text
    unknown = {"input": "x", "model": "edits", "tools": []}
    error_of(await served.client.post("/v1/responses", json=unknown), 400)
    after = [counted(*row) for row in rows]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 1, 0, 0, 4]


def test_a_name_without_a_star_goes_before_a_pattern() -> None:
    config = config_of()
    names = ModelNames(config, config.ids)
    assert [names.resolve(name) for name in ("dall-e-2", "dall-e-3")] == ["small", "org/large"]


def test_the_widest_limits_hold_before_the_model_is_known() -> None:
    config = config_of()
    models = ServedModels.create(config, [FakeBackend() for _ in config.ids])
    limits = models.limits
    assert (limits.max_steps, limits.max_images, limits.max_pixels) == (80, 4, LIMITS.max_pixels)
    single = AppConfig()
    assert ServedModels.create(single, FakeBackend()).limits == single.engine.limits
