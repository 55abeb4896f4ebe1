"""Metrics and log lines of requests, through the whole gateway."""

import asyncio
import hashlib
import logging
import random
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from serve_app.config.models import ModelConfig
from serve_app.errors import Overloaded
from serve_app.gateway.auth import KeyRing
from serve_app.gateway.requests_log import NOBODY, parts_since_arrival
from serve_app.gateway.routes import create_api
from serve_app.gateway.schemas import PARTS
from serve_app.metrics.export import report
from serve_app.metrics.gateway import REQUESTS
from serve_app.metrics.labels import OUTCOMES, UNSERVED
from serve_app.metrics.registry import GATEWAY
from serve_app.protocol.params import Priority
from tests.fakes.backend import CONFIG, FakeBackend

pytestmark = pytest.mark.anyio

PATH = "/v1/images/generations"


def sample(name: str, model: str, **labels: str) -> float:
    value = GATEWAY.get_sample_value(f"diffusion_serve_{name}", {"model": model, **labels})
    return value or 0.0


def keys(folder: Path, per_minute: int) -> KeyRing:
    path = folder / "keys.yaml"
    one, night = (hashlib.sha256(key).hexdigest() for key in (b"sk-one", b"sk-night"))
    path.write_text(
        f"- {{name: one, sha256: {one}, requests_per_minute: {per_minute}}}\n"
        f"- {{name: night, sha256: {night}, requests_per_minute: 1, priority: batch}}\n"
    )
    return KeyRing(path, None)


def client_of(backend: FakeBackend, model: str, ring: KeyRing | None = None) -> httpx.AsyncClient:
    """Make the client of a gateway with series of its own."""
    config = CONFIG.model_copy(update={"model": ModelConfig(id=model)})
    api = create_api(config, backend, ring or KeyRing(None, None))
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def test_requests_count_by_outcome_and_key(backend: FakeBackend, tmp_path: Path) -> None:
    def count(key: str, outcome: str, priority: Priority = "interactive") -> float:
        return sample("requests_total", "counted", key=key, outcome=outcome, priority=priority)

    async with client_of(backend, "counted", keys(tmp_path, 3)) as client:
        mine = {"Authorization": "Bearer sk-one"}
        await client.post(PATH, json={"prompt": "x"}, headers=mine)
        await client.post(PATH, json={"prompt": "x", "size": "1x1"}, headers=mine)
        await client.get("/v1/models", headers=mine)
        await client.post(PATH, json={"prompt": "x"}, headers=mine)
        await client.post(PATH, json={"prompt": "x"})
        for _ in range(2):
            theirs = {"Authorization": "Bearer sk-night"}
            await client.post(PATH, json={"prompt": "x"}, headers=theirs)
    assert count("night", "completed", "batch") == 1
    assert count("night", "rate_limit_exceeded", "batch") == 1  # rejected, but known
    assert count("one", "completed") == 1
    assert count("one", "invalid_value") == 1
    assert count("one", "rate_limit_exceeded") == 1
    assert count(NOBODY, "invalid_api_key") == 1
    assert sample("request_seconds_count", "counted") == 2


async def test_counters_exist_before_the_first_event(backend: FakeBackend, tmp_path: Path) -> None:
    """To Prometheus, a series that begins with a 1 has not increased."""
    async with client_of(backend, "unused", keys(tmp_path, 3)) as client:
        await client.get("/health")
    of_all = [("one", "interactive"), ("night", "batch"), (NOBODY, "interactive")]
    found = [
        (one.labels["key"], one.labels["priority"], one.labels["outcome"], one.value)
        for family in REQUESTS.collect()
        for one in family.samples
        if one.labels["model"] == "unused" and one.name.endswith("_total")
    ]
    assert sorted(found) == sorted(
        (*principal, name, 0.0) for principal in of_all for name in OUTCOMES
    )
    async with client_of(backend, "open to all") as client:
        await client.get("/health")
    for outcome in ("completed", *UNSERVED):
        labels = {"key": "anonymous", "priority": "interactive", "outcome": outcome}
        name = "diffusion_serve_requests_total"
        assert GATEWAY.get_sample_value(name, {"model": "open to all", **labels}) == 0


async def test_open_requests_have_arrived_and_not_ended(
    backend: FakeBackend, tmp_path: Path
) -> None:
    def still() -> tuple[float, ...]:
        return tuple(
            sample("open_requests", "open", priority=priority) for priority in get_args(Priority)
        )

    async def until(count: tuple[int, int]) -> None:
        async with asyncio.timeout(10):
            while still() != count:
                await asyncio.sleep(0)

    async with client_of(backend, "open", keys(tmp_path, 99)) as client:

        def ask(key: str, **body: Any) -> "asyncio.Task[httpx.Response]":
            headers = {"Authorization": f"Bearer sk-{key}"}
            return asyncio.create_task(
                client.post(PATH, json={"prompt": "x"} | body, headers=headers)
            )

        backend.accepting.clear()  # as without any replica
        done, streamed, gone, batch = (
            ask("one"),
            ask("one", stream=True),
            ask("one"),
            ask("night", n=3),
        )
        await until((3, 1))
        gone.cancel()
        await until((2, 1))
        assert (await client.get("/health")).status_code == 200
        assert (await client.post(PATH, json={"prompt": "x"})).status_code == 401
        assert still() == (2, 1)
        backend.error_in_the_middle = RuntimeError("a bug")
        backend.accepting.set()
        await asyncio.wait([done, streamed, batch])
    assert still() == (0, 0)


async def test_a_full_queue_counts_as_a_rejection(backend: FakeBackend) -> None:
    async def reject(error: Overloaded, **body: Any) -> None:
        backend.error = error
        response = await client.post(PATH, json={"prompt": "x"} | body)
        assert response.status_code == 429

    async with client_of(backend, "full") as client:
        await reject(Overloaded("an engine's own rejection", None, 3.0, 1.0))
        assert (
            GATEWAY.get_sample_value(
                "diffusion_serve_rejections_total", {"model": "full", "reason": "queue"}
            )
            == 0
        )
        await reject(Overloaded("Serve's queue", retry_after_s=9.0), n=2)
        await reject(Overloaded("Serve's queue"), stream=True)
        assert sample("rejections_total", "full", reason="queue") == 3
        backend.overloaded = True  # before the first replica has described the model
        await reject(Overloaded("not called"), n=4)
        assert sample("rejections_total", "full", reason="queue") == 7


async def test_rejections_and_failures_count_by_their_codes(backend: FakeBackend) -> None:
    async with client_of(backend, "failed") as client:
        for error in (Overloaded("full", retry_after_s=3.0), RuntimeError("a bug")):
            backend.error = error
            await client.post(PATH, json={"prompt": "x"})
        backend.error, backend.error_in_the_middle = None, RuntimeError("a bug")
        await client.post(PATH, json={"prompt": "x", "stream": True})
    for outcome, times in (("overloaded", 1), ("internal_error", 2)):
        labels = {"key": "anonymous", "priority": "interactive", "outcome": outcome}
        assert sample("requests_total", "failed", **labels) == times, outcome


@pytest.mark.usefixtures("old")
async def test_parts_add_up_to_the_total(backend: FakeBackend) -> None:
    async with client_of(backend, "parts") as client:
        timings = (await client.post(PATH, json={"prompt": "x"})).json()["timings"]
        counts = {"denoiser_calls", "extrapolated_calls"}
        assert timings.keys() == {*(f"{part}_s" for part in PARTS), "total_s", *counts}
        body = {"prompt": "x", "stream": True, "partial_images": 2}
        await client.post(PATH, json=body)
    for part, seconds in (("encode", 0.0625), ("denoise", 1.0), ("decode", 0.125)):
        assert timings[f"{part}_s"] == seconds
        assert sample("request_part_seconds_sum", "parts", part=part) == 2 * seconds
        assert sample("request_part_seconds_count", "parts", part=part) == 2
    assert timings["queue_s"] >= 0.25  # the backend's time and the way to it
    assert timings["response_s"] >= 0.5
    assert sum(timings[f"{part}_s"] for part in PARTS) == pytest.approx(timings["total_s"])
    sums = [sample("request_part_seconds_sum", "parts", part=part) for part in PARTS]
    assert sum(sums) == pytest.approx(sample("request_seconds_sum", "parts"))
    assert sample("first_partial_seconds_count", "parts") == 1


@pytest.mark.parametrize(
    ("now_s", "age_s", "parts"),
    [
        (10.0, 6.0, (4.5, 1.0, 3.0, 1.0)),  # half a second is for the file
        (10.0, 0.0, (10.0, 0.0, 0.0, 0.0)),
        (5.5, 6.0, (0.5, 1.0, 3.0, 1.0)),
        (3.0, 6.0, (0.5, 1.0, 1.5, 0.0)),
    ],
)
def test_unaccounted_time_counts_as_queue(
    now_s: float, age_s: float, parts: tuple[float, ...]
) -> None:
    assert parts_since_arrival(now_s, age_s, (0.5, 1.0, 3.0, 1.0)) == pytest.approx(parts)
    assert parts_since_arrival(now_s, age_s, ()) == ()


@pytest.mark.usefixtures("old")
async def test_every_request_logs_one_line(
    backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "serve_app.gateway.requests_log")
    async with client_of(backend, "logged") as client:
        body = {"prompt": "secret", "n": 3, "size": "48x24", "seed": 5, "num_inference_steps": 4}
        await client.post(PATH, json=body, headers={"x-request-id": "call-1"})
        await client.post(PATH, json={"prompt": "secret", "size": "9x9", "user": "a\nb"})
        await client.get("/health")
    first, second = [one for one in caplog.records if one.name == "serve_app.gateway.requests_log"]
    assert re.fullmatch(
        r"request call-1 of anonymous: 48x24, 4 steps, 3 images, seed 5: completed after "
        r"\d\.\d{3} s \(queue \d\.\d{3}, encode 0\.062, denoise 1\.000, decode 0\.125, "
        r"response \d\.\d{3}\)",
        first.getMessage(),
    )
    assert re.fullmatch(
        r"request none of anonymous for 'a\\nb': invalid_value after \d\.\d{3} s",
        second.getMessage(),
    )
    assert not hasattr(first, "safety_identifier")
    fields: Any = second
    assert fields.safety_identifier == "a\nb"
    fields = first
    assert (fields.request_id, fields.key, fields.outcome) == ("call-1", "anonymous", "completed")
    assert (fields.size, fields.steps, fields.seed, fields.images) == ("48x24", 4, 5, 3)
    assert (fields.denoise_s, fields.decode_s) == (1.0, 0.125)
    assert not any(
        "secret" in str(value) for one in (first, second) for value in vars(one).values()
    )


@pytest.fixture
async def fuzzed(backend: FakeBackend, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(backend, "fuzzed", keys(tmp_path, 100)) as client:
        yield client


async def test_no_request_can_make_a_new_series(fuzzed: httpx.AsyncClient) -> None:
    draw = random.Random(7)

    def series() -> int:
        samples = [one for family in report("gateway", "a").families for one in family.samples]
        ours = [one.labels for one in samples if one.labels.get("model") == "fuzzed"]
        assert {labels["key"] for labels in ours if "key" in labels} <= {"one", "night", NOBODY}
        assert {labels["outcome"] for labels in ours if "outcome" in labels} <= set(OUTCOMES)
        assert {labels["part"] for labels in ours if "part" in labels} <= set(PARTS)
        return len(ours)

    async def send(times: int) -> None:
        for _ in range(times):
            word = f"{draw.getrandbits(64):x}"
            body: dict[str, Any] = {
                "prompt": draw.choice(["x", word, ""]),
                "size": draw.choice(["64x64", "1x1", word, f"{draw.randrange(9999)}x8"]),
                "model": draw.choice([None, "fuzzed", word]),
                "scheduler": draw.choice([None, word]),
                "lora": draw.choice([None, word, {"ink": 1.0}]),
                draw.choice(["user", word]): "x",
            }
            key = draw.choice(["sk-one", word])
            headers = {"Authorization": f"Bearer {key}", "x-request-id": word * draw.randrange(20)}
            await fuzzed.post(draw.choice([PATH, f"{PATH}/{word}"]), json=body, headers=headers)

    await send(1)
    # Every outcome once, so that all possible series exist.
    for outcome in OUTCOMES:
        for key in ("one", "night", NOBODY):
            for priority in get_args(Priority):
                REQUESTS.labels("fuzzed", key, priority, outcome)
    before = series()
    await send(300)
    assert series() == before < 400


async def test_no_request_id_breaks_the_exposition(backend: FakeBackend) -> None:
    async with client_of(backend, "exemplars") as client:
        for name in ('a"} 1 # {', "x" * 200, "call-42"):
            await client.post(PATH, json={"prompt": "x"}, headers={"x-request-id": name})
        answer = await client.get("/metrics", headers={"accept": "application/openmetrics-text"})
    found = {
        sample.exemplar.labels["request_id"]
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if sample.exemplar and sample.labels["model"] == "exemplars"
    }
    assert found == {"call-42"}
