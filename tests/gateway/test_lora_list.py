"""The list of LoRA adapters."""

import httpx
import pytest

from serve_app.errors import LoraSourceAway
from serve_app.protocol.loras import LoraInfo, LoraList, LoraStatus, status_of
from tests.fakes.backend import FakeBackend
from tests.gateway.conftest import error_of
from tests.gateway.test_key_models import served_to
from tests.gateway.test_several_models import config_of, serving

pytestmark = pytest.mark.anyio

ADAPTERS = (LoraStatus("fixed", False, 2), LoraStatus("styles/oil", True, 1))


async def test_adapters_are_listed_with_the_replicas_that_have_them(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.adapters = ADAPTERS
    response = await client.get("/v1/loras")
    assert response.json() == {
        "object": "list",
        "data": [
            {
                "id": "fixed",
                "object": "lora",
                "model": "demo",
                "on_demand": False,
                "replicas": 2,
            },
            {
                "id": "styles/oil",
                "object": "lora",
                "model": "demo",
                "on_demand": True,
                "replicas": 1,
            },
        ],
    }


async def test_a_list_of_several_models_may_be_of_one() -> None:
    async with serving(config_of()) as gateway:
        gateway.backends["small"].adapters = ADAPTERS[:1]
        gateway.backends["org/large"].adapters = ADAPTERS[1:]
        for query, models in (
            ("", ["small", "org/large"]),
            ("?model=org/large", ["org/large"]),
            ("?model=dall-e-3", ["org/large"]),
            ("?model=edits", []),
        ):
            data = (await gateway.client.get(f"/v1/loras{query}")).json()["data"]
            assert [one["model"] for one in data] == models
        response = await gateway.client.get("/v1/loras?model=none")
        assert error_of(response, 404)["code"] == "model_not_found"


async def test_a_key_sees_the_adapters_of_its_models() -> None:
    async with served_to("one") as gateway:
        for backend in gateway.backends.values():
            backend.adapters = ADAPTERS
        data = (await gateway.client.get("/v1/loras")).json()["data"]
        assert {one["model"] for one in data} == {"small"}
        other = await gateway.client.get("/v1/loras?model=org/large")
        assert error_of(other, 404)["code"] == "model_not_found"


async def test_a_source_that_is_away_is_a_503(
    client: httpx.AsyncClient, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away() -> tuple[LoraStatus, ...]:
        raise LoraSourceAway("no replica could list its LoRA adapters; try again later.")

    monkeypatch.setattr(backend, "loras", away)
    response = await client.get("/v1/loras")
    assert error_of(response, 503)["code"] == "lora_source_unavailable"


def test_the_adapters_of_replicas_are_put_together() -> None:
    fixed, both = LoraInfo("z", True, False), LoraInfo("b", True, True)
    one = LoraList((fixed, both, LoraInfo("a", False, True)))
    two = LoraList((fixed, both, LoraInfo("c", True, True)))
    assert status_of([one, two]) == (
        LoraStatus("z", False, 2),
        LoraStatus("a", True, 0),
        LoraStatus("b", True, 2),
        LoraStatus("c", True, 1),
    )
    assert status_of([]) == ()
