"""Traces of the served demo, as a collector receives them."""

import itertools
import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from serve_app.gateway.schemas import PARTS
from tests.collector import Collector, collecting, values
from tests.serve_process import demo_config, free_port, start_serve

pytestmark = pytest.mark.serve

PATH = "/v1/images/generations"

STEPS = 120
"""Steps of the long requests. The SDK keeps 128 events of a span."""

LONG, SHORT, DROPPED, SEVERAL = (f"{number:032x}" for number in range(1, 5))
"""Trace IDs of the clients."""


def traceparent(trace_id: str) -> dict[str, str]:
    return {"traceparent": f"00-{trace_id}-00000000000000aa-01"}


@dataclass(frozen=True)
class Trace:
    """The spans of one request."""

    spans: list[Span]

    @property
    def server(self) -> Span:
        [span] = [one for one in self.spans if one.kind == Span.SPAN_KIND_SERVER]
        return span

    def below(self, parent: Span) -> list[Span]:
        of_it = [one for one in self.spans if one.parent_span_id == parent.span_id]
        return sorted(of_it, key=lambda one: (one.start_time_unix_nano, one.end_time_unix_nano))


@dataclass(frozen=True)
class Run:
    """Responses to the clients of a server, and the spans that it sent before it ended."""

    collector: Collector
    long: dict[str, str]
    """Headers of the long request's response."""
    short: httpx.Response
    short_s: float
    """Time that the short request's client waited."""

    def trace(self, trace_id: str) -> Trace:
        return Trace([one for one in self.collector.spans if one.trace_id.hex() == trace_id])


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Run a server that sends its spans only at its end, and end it."""
    config: dict[str, Any] = demo_config(port := free_port())
    [application] = config["applications"]
    application["args"]["gateway"] = {"tracing": True}
    with collecting() as collector:
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_SERVICE_NAME": "images",
            "OTEL_BSP_SCHEDULE_DELAY": "3600000",
        }
        running = start_serve(config, variables)
        try:
            url = f"http://127.0.0.1:{port}"
            running.wait_until_ready(url)
            with httpx.Client(base_url=url, timeout=240) as client:
                used = _use(client, collector)
            running.process.send_signal(signal.SIGINT)  # as Ctrl-C does: Serve ends its replicas
            running.process.wait(60)
            yield used
        finally:
            running.stop()


def _use(client: httpx.Client, collector: Collector) -> Run:
    body: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": STEPS}
    client.post(PATH, json={"prompt": "to begin with"}, headers={"traceparent": "nonsense"})
    streamed = body | {"stream": True, "progress": True, "seed": 1}
    with client.stream("POST", PATH, json=streamed, headers=traceparent(LONG)) as long:
        events = (json.loads(line[5:]) for line in long.iter_lines() if line.startswith("data:"))
        next(event for event in events if event.get("step"))
        client.get("/health")  # opening the second connection is not the server's time
        started_at = perf_counter()
        headers = traceparent(SHORT) | {"x-request-id": "the-short-one"}
        short = client.post(PATH, json=body | {"num_inference_steps": 60}, headers=headers)
        short_s = perf_counter() - started_at
        assert list(events)[-1]["type"] == "image_generation.completed"
    large = body | {"size": "256x256"}
    with pytest.raises(httpx.ReadTimeout):
        client.post(PATH, json=large, headers=traceparent(DROPPED), timeout=2.0)
    several = body | {"n": 2, "num_inference_steps": 4}
    assert client.post(PATH, json=several, headers=traceparent(SEVERAL)).status_code == 200
    assert not collector.batches
    return Run(collector, dict(long.headers), short, short_s)


def assert_fills(parts: list[Span], whole: Span) -> None:
    for before, after in itertools.pairwise(parts):
        assert before.end_time_unix_nano == after.start_time_unix_nano
    assert parts[0].start_time_unix_nano == whole.start_time_unix_nano
    assert parts[-1].end_time_unix_nano == whole.end_time_unix_nano


def seconds(span: Span) -> float:
    return (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


def test_the_clients_trace_continues_through_every_part(
    run: Run, report: Callable[[str], None]
) -> None:
    assert run.short.status_code == 200
    trace = run.trace(SHORT)
    server = trace.server
    assert server.parent_span_id.hex() == "00000000000000aa"
    assert run.short.headers["traceparent"] == f"00-{SHORT}-{server.span_id.hex()}-01"
    assert run.short.headers["x-request-id"] == "the-short-one"
    found = values(server.attributes)
    assert found["diffusion_serve.request_id"] == "the-short-one"
    assert (found["http.response.status_code"], found["gen_ai.request.model"]) == (200, "demo")
    assert (found["diffusion_serve.size"], found["diffusion_serve.steps"]) == ("64x64", 60)
    assert found["diffusion_serve.replica"]
    assert found["gen_ai.request.seed"] == run.short.json()["data"][0]["seed"]
    assert "red circle" not in str(trace.spans)
    parts = trace.below(server)
    assert [part.name for part in parts] == list(PARTS)
    assert_fills(parts, server)
    for part, name in zip(parts[1:4], PARTS[1:4], strict=True):
        reported_s = run.short.json()["timings"][f"{name}_s"]
        assert seconds(part) == pytest.approx(reported_s, abs=1e-6)
    assert run.short.json()["timings"]["total_s"] <= seconds(server) <= run.short_s
    off = 1 - seconds(server) / run.short_s
    report(f"a traced request of {run.short_s:.2f} s: {off:.1%} of it is in no part of its trace")
    assert {one["service.name"] for one in run.collector.resources} == {"images"}


def test_steps_are_events_of_the_denoise_span(run: Run) -> None:
    [denoise] = [one for one in run.trace(LONG).spans if one.name == "denoise"]
    steps = [values(event.attributes)["diffusion_serve.step"] for event in denoise.events]
    assert steps == list(range(1, STEPS + 1))
    at = [event.time_unix_nano for event in denoise.events]
    assert at == sorted(at)
    assert denoise.start_time_unix_nano < at[0] <= at[-1] == denoise.end_time_unix_nano
    sizes = {values(event.attributes)["diffusion_serve.batch_size"] for event in denoise.events}
    assert sizes == {1, 2}


def test_requests_of_one_batch_are_linked(run: Run) -> None:
    long, short = run.trace(LONG), run.trace(SHORT)
    for one, other in ((long, short), (short, long)):
        [denoise] = [span for span in one.spans if span.name == "denoise"]
        assert [link.span_id for link in denoise.links] == [other.server.span_id]
        assert [link.trace_id for link in denoise.links] == [other.server.trace_id]
    assert run.long["traceparent"] == f"00-{LONG}-{long.server.span_id.hex()}-01"


def test_a_client_that_disconnects_ends_its_trace_as_cancelled(run: Run) -> None:
    trace = run.trace(DROPPED)
    found = values(trace.server.attributes)
    assert found["diffusion_serve.outcome"] == "cancelled"
    parts = trace.below(trace.server)
    assert [part.name for part in parts] == ["queue", "encode", "denoise"]
    assert_fills(parts, trace.server)
    assert 1.5 < seconds(trace.server) < 10


def test_each_of_several_images_is_a_child_span(run: Run) -> None:
    trace = run.trace(SEVERAL)
    *images, response = trace.below(trace.server)
    assert [one.name for one in (*images, response)] == ["image", "image", "response"]
    for image in images:
        parts = trace.below(image)
        assert [part.name for part in parts] == list(PARTS[:-1])
        assert_fills(parts, image)
        [denoise] = [part for part in parts if part.name == "denoise"]
        assert not denoise.links  # not to itself


def test_an_invalid_traceparent_starts_a_new_trace(run: Run) -> None:
    known = {LONG, SHORT, DROPPED, SEVERAL}
    strangers = {one.trace_id.hex() for one in run.collector.spans} - known
    [trace_id] = strangers
    assert run.trace(trace_id).server.parent_span_id == b""
