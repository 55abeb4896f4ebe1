"""Traces on their way to the collector."""

import logging
import threading
from time import perf_counter
from typing import Any

import httpx
import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

from serve_app.gateway.auth import KeyRing
from serve_app.gateway.routes import create_api
from serve_app.gateway.tracing import Tracing
from tests.collector import collecting
from tests.fakes.backend import CONFIG, FakeBackend
from tests.waiting import wait_until

pytestmark = pytest.mark.anyio


PATH = "/v1/images/generations"


def tracing_to(url: str, monkeypatch: pytest.MonkeyPatch, **variables: str) -> Tracing:
    settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "10", **variables}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return Tracing.to_collector(CONFIG, "gateway-1")


async def request(tracing: Tracing) -> float:
    """Return the duration of one request."""
    api = create_api(CONFIG, FakeBackend(), KeyRing(None, None), traced=tracing.middleware)
    transport = httpx.ASGITransport(api)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        started_at = perf_counter()
        assert (await client.post(PATH, json={"prompt": "x"})).status_code == 200
        return perf_counter() - started_at


def wait_until_flushed() -> None:
    """Wait for exports in the background."""
    wait_until(lambda: all(thread.name != "flush" for thread in threading.enumerate()))


async def test_the_last_spans_are_sent_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting() as collector:
        tracing = tracing_to(collector.url, monkeypatch, OTEL_BSP_SCHEDULE_DELAY="3600000")
        await request(tracing)
        assert not collector.batches
        tracing.close()
        assert len(collector.batches) == 1


async def test_a_hanging_collector_delays_neither_requests_nor_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with collecting() as collector:
        collector.answering.clear()
        tracing = tracing_to(collector.url, monkeypatch)
        await request(tracing)
        wait_until(lambda: collector.batches)
        assert await request(tracing) < 5.0  # while a batch is being sent; the exporter waits 10 s
        started_at = perf_counter()
        tracing.close(within_s=0.2)
        assert perf_counter() - started_at < 5.0
        collector.answering.set()
        wait_until_flushed()


async def test_an_unreachable_collector_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with collecting() as collector:
        collector.status = 400
        tracing = tracing_to(collector.url, monkeypatch)
        for batches in (1, 2, 3):
            await request(tracing)
            wait_until(lambda batches=batches: len(collector.batches) >= batches)
        collector.status = 200
        await request(tracing)
        wait_until(lambda: "accepts traces again" in caplog.text)
        tracing.close()
    logged = [one for one in caplog.records if one.name == "serve_app.gateway.tracing"]
    assert [one.levelname for one in logged] == ["WARNING", "INFO"]
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in logged[0].getMessage()
    assert "code: 400" in logged[0].getMessage()
    assert not [one for one in caplog.records if one.name.startswith("opentelemetry")]


async def test_an_unreachable_collector_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracing = tracing_to("http://127.0.0.1:9", monkeypatch, OTEL_EXPORTER_OTLP_TIMEOUT="2.5")
    await request(tracing)
    tracing.close()
    [logged] = [one for one in caplog.records if one.name == "serve_app.gateway.tracing"]
    assert "127.0.0.1" in logged.getMessage()
    assert "refused" in logged.getMessage()


async def test_a_full_queue_drops_spans(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with collecting() as collector:
        collector.answering.clear()
        limits = {"OTEL_BSP_MAX_QUEUE_SIZE": "16", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "16"}
        tracing = tracing_to(collector.url, monkeypatch, **limits)
        for _ in range(30):
            await request(tracing)
        wait_until(lambda: collector.batches)
        [processor] = tracing.provider._active_span_processor._span_processors
        queue: Any = vars(processor)["_batch_processor"]._queue
        assert len(queue) <= 16
        assert not [one for one in caplog.records if one.name.startswith("opentelemetry")]
        tracing.close(within_s=0.2)
        collector.answering.set()
        wait_until_flushed()


async def test_the_environment_names_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    def resource(**variables: str) -> dict[str, Any]:
        tracing = tracing_to("http://127.0.0.1:9", monkeypatch, **variables)
        tracing.close()
        return dict(tracing.provider.resource.attributes)

    found = resource()
    assert found["service.name"] == "diffusion-serve"
    assert found["service.instance.id"] == "gateway-1"
    found = resource(OTEL_SERVICE_NAME="images", OTEL_RESOURCE_ATTRIBUTES="deployment=blue")
    assert (found["service.name"], found["deployment"]) == ("images", "blue")
    tracing = tracing_to("http://127.0.0.1:9", monkeypatch, OTEL_SDK_DISABLED="true")
    await request(tracing)
    tracing.close()


def test_warnings_of_the_exporter_reach_the_filter() -> None:
    """The exporter warns on its module's logger; `LoggedOnce` filters no other."""
    exporter = OTLPSpanExporter("http://127.0.0.1:9/v1/traces")
    assert vars(exporter)["_client"]._logger.name == type(exporter).__module__
    exporter.shutdown()
