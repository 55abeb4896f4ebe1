"""Running requests of AUTOMATIC1111's API: progress, interrupts, keys, the log and failures."""

import asyncio
from typing import Any

import httpx
import pytest

from tests.gateway.sdapi.clients import IMAGE_TO_IMAGE, SILLYTAVERN
from tests.gateway.sdapi.gateway import (
    BLUE,
    KEYS,
    SMALL,
    Backend,
    b64,
    client_of,
    rejected,
)

pytestmark = pytest.mark.anyio


async def _until_running(client: httpx.AsyncClient, count: int, **headers: str) -> dict[str, Any]:
    for _ in range(500):
        answer: dict[str, Any] = (await client.get("/progress", headers=headers)).json()
        if answer["state"]["job_count"] == count:
            return answer
        await asyncio.sleep(0.01)
    raise AssertionError(f"not {count} running requests: {answer}")


def _key(name: str) -> dict[str, str]:
    return {"authorization": f"Basic {b64(f'user:sk-{name}'.encode())}"}


async def test_an_interrupt_ends_the_requests_of_its_key_only(backend: Backend) -> None:
    backend.slow_seed = 1
    async with client_of(backend, KEYS) as client:
        posted = {
            name: asyncio.create_task(
                client.post("/txt2img", json=SMALL | {"batch_size": 2}, headers=_key(name))
            )
            for name in ("a", "b")
        }
        for name in ("a", "b"):
            await _until_running(client, 1, **_key(name))
        async with asyncio.timeout(60):  # one image of each is done, and its generator closed
            while backend.cancelled < 2:
                await asyncio.sleep(0.01)
        halfway = await _until_running(client, 1, **_key("a"))
        assert halfway["progress"] == 0.5
        assert halfway["eta_relative"] > 0
        assert halfway["state"]["sampling_step"] == 10
        assert halfway["state"]["sampling_steps"] == 20
        assert (await client.post("/interrupt", headers=_key("a"))).status_code == 200
        response = await posted["a"]
        assert response.status_code == 499
        assert "interrupt" in response.json()["detail"]
        assert response.json()["error"]["code"] == "cancelled"
        assert backend.cancelled == 3
        await _until_running(client, 0, **_key("a"))
        await _until_running(client, 1, **_key("b"))
        posted["b"].cancel()
        await asyncio.gather(posted["b"], return_exceptions=True)


async def test_keys_hold_for_every_path(backend: Backend) -> None:
    async with client_of(backend, KEYS) as client:
        for path in ("/options", "/progress", "/samplers", "/nothing"):
            response = await client.get(path)
            assert response.status_code == 401
            assert "API key" in response.json()["detail"]
        assert (await client.post("/txt2img", json=SMALL)).status_code == 401
        assert (await client.post("/interrupt")).status_code == 401
        assert backend.received == []
        for headers in (_key("a"), {"authorization": "Bearer sk-a"}):
            response = await client.post("/txt2img", json=SMALL, headers=headers)
            assert response.status_code == 200


async def test_requests_are_logged_with_their_key(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "serve_app.gateway.requests_log")
    async with client_of(backend, KEYS) as client:
        await client.post("/txt2img", json=SILLYTAVERN, headers=_key("b"))
        await client.post(
            "/img2img", json=IMAGE_TO_IMAGE | {"init_images": [BLUE]}, headers=_key("b")
        )
        await client.post("/txt2img", json=SMALL | {"enable_hr": True}, headers=_key("b"))
    outcomes = [(vars(line)["key"], vars(line)["outcome"]) for line in caplog.records]
    assert outcomes == [("b", "completed"), ("b", "completed"), ("b", "invalid_value")]
    assert "secret" not in caplog.text


async def test_failures_have_the_usual_statuses(
    client: httpx.AsyncClient, backend: Backend
) -> None:
    backend.error = RuntimeError("broken")
    error = await rejected(client, status=500, **SMALL)
    assert "broken" not in error["message"]
    backend.ready = False
    assert (await rejected(client, status=503, **SMALL))["code"] == "unavailable"
    assert (await client.get("/samplers")).status_code == 503
    backend.ready, backend.overloaded = True, True
    assert (await rejected(client, status=429, **SMALL))["code"] == "overloaded"
