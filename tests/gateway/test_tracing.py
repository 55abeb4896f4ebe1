"""The spans of requests, through the whole gateway and OpenTelemetry's own SDK."""

import asyncio
import logging
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.context import Context
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    Decision,
    ParentBased,
    SamplingResult,
    StaticSampler,
)
from opentelemetry.trace import (
    Link,
    SpanKind,
    StatusCode,
    TraceFlags,
    TraceState,
    format_span_id,
    format_trace_id,
)
from opentelemetry.util.types import Attributes

from serve_app.config.models import AppConfig, ModelEntry
from serve_app.errors import GenerationFailed, Overloaded
from serve_app.gateway.auth import KeyRing
from serve_app.gateway.routes import create_api
from serve_app.gateway.schemas import PARTS
from serve_app.protocol.backend import GenerationEvent
from serve_app.protocol.events import Queued, Timeline
from tests.fakes.backend import CONFIG, FakeBackend
from tests.gateway.traced import (
    PARENT,
    PARENT_ID,
    PATH,
    PEERS,
    STEPS,
    TRACE_ID,
    Gateway,
    TracedBackend,
    assert_fills,
    attributes,
    context,
    names,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def backend() -> TracedBackend:
    return TracedBackend()


async def test_the_parts_of_an_image_fill_its_request(backend: TracedBackend) -> None:
    gateway = Gateway(backend)
    response = await gateway.post(
        {"x-request-id": "call-1"}, size="48x24", seed=5, num_inference_steps=3
    )
    assert response.status_code == 200
    server = gateway.server
    assert server.name == f"POST {PATH}"
    assert server.parent is None
    assert server.status.status_code is StatusCode.UNSET
    assert attributes(server) == {
        "http.request.method": "POST",
        "http.route": PATH,
        "url.path": PATH,
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "user_agent.original": f"python-httpx/{httpx.__version__}",
        "http.response.status_code": 200,
        "gen_ai.request.model": "demo",
        "gen_ai.output.type": "image",
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.seed": 5,
        "diffusion_serve.request_id": "call-1",
        "diffusion_serve.key": "anonymous",
        "diffusion_serve.outcome": "completed",
        "diffusion_serve.size": "48x24",
        "diffusion_serve.steps": 3,
        "diffusion_serve.replica": "engine-1",
    }
    parts = gateway.below(server)
    assert names(parts) == list(PARTS)
    assert len(gateway.spans) == 1 + len(PARTS)
    assert_fills(parts, server.start_time, server.end_time)
    took_ns = [(part.end_time or 0) - (part.start_time or 0) for part in parts]
    reported_ns = [response.json()["timings"][f"{part}_s"] * 1e9 for part in PARTS[:-1]]
    assert took_ns[:-1] == pytest.approx(reported_ns, abs=2)
    assert took_ns[0] > 10_000  # it includes the gateway's own time
    assert took_ns[1:4] == pytest.approx([20_000, 40_000, 10_000], abs=1)
    assert "secret" not in "".join(span.to_json() for span in gateway.spans)


async def test_steps_are_events_and_batch_peers_are_linked(backend: TracedBackend) -> None:
    gateway = Gateway(backend)
    await gateway.post()
    [denoise] = [span for span in gateway.spans if span.name == "denoise"]
    assert denoise.start_time is not None
    seen = [
        (event.name, event.timestamp - denoise.start_time, dict(event.attributes or {}))
        for event in denoise.events
    ]
    assert [(name, found) for name, _, found in seen] == [
        ("step", {"diffusion_serve.step": number, "diffusion_serve.batch_size": step.batch_size})
        for number, step in enumerate(STEPS, 1)
    ]
    after_ns = [after for _, after, _ in seen]
    assert after_ns == pytest.approx([step.ended_s * 1e9 for step in STEPS], abs=1)
    linked = [(link.context.trace_id, link.context.span_id) for link in denoise.links]
    assert linked == [(1, 1), (2, 2)]


async def test_each_of_several_images_is_a_child_span(backend: TracedBackend) -> None:
    gateway = Gateway(backend)
    await gateway.post(n=3, seed=7)
    server = gateway.server
    *images, response = gateway.below(server)
    assert names(images) == ["image"] * 3
    assert sorted(attributes(one)["gen_ai.request.seed"] for one in images) == [7, 8, 9]
    for image in images:
        parts = gateway.below(image)
        assert names(parts) == list(PARTS[:-1])
        assert_fills(parts, server.start_time, image.end_time)
    assert response.name == "response"
    assert response.start_time == max(image.end_time or 0 for image in images)
    assert response.end_time == server.end_time


async def test_the_trace_of_the_client_continues(backend: TracedBackend) -> None:
    gateway = Gateway(backend)
    response = await gateway.post({"traceparent": PARENT, "tracestate": "vendor=opaque"})
    server = gateway.server
    assert format_trace_id(context(server).trace_id) == TRACE_ID
    assert server.parent is not None
    assert format_span_id(server.parent.span_id) == PARENT_ID
    assert server.parent.is_remote
    assert context(server).trace_state.to_header() == "vendor=opaque"
    own = f"00-{TRACE_ID}-{format_span_id(context(server).span_id)}-01"
    assert response.headers["traceparent"] == own
    assert [context.trace for context in backend.contexts] == [own]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"traceparent": ""},
        {"traceparent": PARENT.upper()},
        {"traceparent": PARENT.replace("00-", "ff-", 1)},
        {"traceparent": f"{PARENT}-more"},
        {"traceparent": f"00-{'0' * 32}-{PARENT_ID}-01"},
        {"traceparent": f"00-{TRACE_ID}-{'0' * 16}-01"},
        {"traceparent": "0" * 5_000},
        [("traceparent", PARENT), ("traceparent", PARENT)],
    ],
    ids=str,
)
async def test_an_invalid_traceparent_begins_a_new_trace(
    backend: TracedBackend, headers: Any
) -> None:
    gateway = Gateway(backend)
    response = await gateway.post(headers)
    assert response.status_code == 200
    assert gateway.server.parent is None
    assert format_trace_id(context(gateway.server).trace_id) in response.headers["traceparent"]
    assert TRACE_ID not in response.headers["traceparent"]


HEADER = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"))


def test_no_trace_header_is_an_error(backend: TracedBackend) -> None:
    gateway = Gateway(backend)

    @given(traceparent=st.just(PARENT) | HEADER, tracestate=HEADER)
    def post(traceparent: str, tracestate: str) -> None:
        gateway.exporter.clear()
        headers: Any = [
            (b"traceparent", traceparent.encode("latin-1")),
            (b"tracestate", tracestate.encode("latin-1")),
        ]
        assert asyncio.run(gateway.post(headers)).status_code == 200
        assert len(gateway.spans) == 1 + len(PARTS)

    post()


@pytest.mark.parametrize("by", ["client", "server"])
async def test_an_unsampled_trace_collects_no_timeline(backend: TracedBackend, by: str) -> None:
    gateway = Gateway(backend, sampler=ParentBased(ALWAYS_OFF) if by == "server" else None)
    headers = {"traceparent": f"{PARENT[:-2]}00"} if by == "client" else None
    response = await gateway.post(headers)
    # The answer has the trace nevertheless.
    assert not int(response.headers["traceparent"][-2:], 16) & TraceFlags.SAMPLED
    assert [context.trace for context in backend.contexts] == [""]
    assert gateway.spans == []


async def test_a_sampler_sees_the_first_of_several_models(backend: TracedBackend) -> None:
    seen = []

    class Noting(StaticSampler):
        def should_sample(
            self,
            parent_context: Context | None,
            trace_id: int,
            name: str,
            kind: SpanKind | None = None,
            attributes: Attributes = None,
            links: Sequence[Link] | None = None,
            trace_state: TraceState | None = None,
        ) -> SamplingResult:
            seen.append((attributes or {}).get("gen_ai.request.model"))
            return super().should_sample(parent_context, trace_id, name, kind, attributes, links)

    config = AppConfig(models=(ModelEntry(id="first"),))
    await Gateway(backend, config, Noting(Decision.DROP)).post(unknown=1)
    assert seen == ["first"]


async def test_without_tracing_there_is_no_trace_header(backend: TracedBackend) -> None:
    api = create_api(CONFIG, backend, KeyRing(None, None))
    transport = httpx.ASGITransport(api)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        headers = {"traceparent": PARENT}
        response = await client.post(PATH, json={"prompt": "x"}, headers=headers)
    assert "traceparent" not in response.headers
    assert [context.trace for context in backend.contexts] == [""]


def test_without_tracing_nothing_is_imported_for_it() -> None:
    program = (
        "import sys, serve_app.deployments.gateway\n"
        "sys.exit(any(name.startswith('opentelemetry.exporter') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=480)


async def test_a_rejected_request_has_a_queue_part(backend: TracedBackend) -> None:
    gateway = Gateway(backend)
    backend.error = Overloaded("full", retry_after_s=3.0)
    response = await gateway.post()
    assert response.status_code == 429
    server = gateway.server
    assert server.status.status_code is StatusCode.UNSET  # it is no server error
    assert attributes(server)["http.response.status_code"] == 429
    assert attributes(server)["diffusion_serve.outcome"] == "overloaded"
    parts = gateway.below(server)
    assert names(parts) == ["queue"]
    assert_fills(parts, server.start_time, server.end_time)
    assert format_span_id(context(server).span_id) in response.headers["traceparent"]


async def test_a_wrong_request_has_no_parts(backend: TracedBackend) -> None:
    gateway = Gateway(backend)
    assert (await gateway.post(size="1x1")).status_code == 400
    assert names(gateway.spans) == [f"POST {PATH}"]
    assert attributes(gateway.server)["diffusion_serve.outcome"] == "invalid_value"
    assert gateway.server.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(GenerationFailed("secret"), "generation_failed"), (RuntimeError("secret"), "internal_error")],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_marks_the_part_where_it_happened(
    backend: TracedBackend, error: Exception, outcome: str, stream: bool
) -> None:
    gateway = Gateway(backend)
    backend.timeline = Timeline((1e-5, 2e-5), STEPS[:1], PEERS[:1])
    backend.error_in_the_middle = error
    response = await gateway.post(stream=stream)
    server = gateway.server
    sent = 200 if stream else 500
    assert response.status_code == attributes(server)["http.response.status_code"] == sent
    assert format_span_id(context(server).span_id) in response.headers["traceparent"]
    assert server.status.status_code is StatusCode.ERROR
    assert attributes(server)["error.type"] == outcome
    parts = gateway.below(server)
    assert names(parts) == ["queue", "encode", "denoise"]
    assert_fills(parts, server.start_time, server.end_time)
    assert [part.status.status_code for part in parts] == [
        StatusCode.UNSET,
        StatusCode.UNSET,
        StatusCode.ERROR,
    ]
    assert len(parts[-1].events) == len(parts[-1].links) == 1
    assert "secret" not in "".join(span.to_json() for span in gateway.spans)


async def test_a_cancelled_request_is_traced_up_to_its_end(backend: TracedBackend) -> None:
    gateway = Gateway(backend)
    backend.slow_seed = 2
    backend.timeline = Timeline((1e-5,))
    asking = asyncio.create_task(gateway.post(n=2, seed=1))
    while not (len(backend.received) == 2 and backend.accepting.is_set()):
        await asyncio.sleep(0)
    for _ in range(200):  # lets the loop finish the image with seed 1
        await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    server = gateway.server
    assert attributes(server)["diffusion_serve.outcome"] == "cancelled"
    assert server.status.status_code is StatusCode.UNSET
    assert "http.response.status_code" not in attributes(server)
    done, dropped = sorted(
        gateway.below(server), key=lambda one: attributes(one)["gen_ai.request.seed"]
    )
    assert names(gateway.below(done)) == list(PARTS[:-1])
    parts = gateway.below(dropped)
    assert names(parts) == ["queue", "encode"]
    assert attributes(parts[-1]) == {"diffusion_serve.outcome": "cancelled"}
    assert_fills(parts, server.start_time, server.end_time)


async def test_the_time_of_a_lost_replica_counts_as_queue(backend: TracedBackend) -> None:
    """The next replica starts again; its time counts from the sending of the request."""

    class Relay(TracedBackend):
        async def generate(
            self, *args: Any, **options: Any
        ) -> AsyncGenerator[GenerationEvent, None]:
            yield Queued(0, 1.0)
            yield Timeline((1e-5, 2e-5), STEPS, PEERS)
            yield Queued(0, 1.0)
            raise GenerationFailed("there as well")

    gateway = Gateway(Relay())
    await gateway.post()
    [queue] = gateway.below(gateway.server)
    assert queue.name == "queue"


async def test_a_faster_clock_puts_no_part_outside_its_request() -> None:
    gateway = Gateway(FakeBackend())  # it reports more than a second
    await gateway.post()
    server = gateway.server
    parts = gateway.below(server)
    assert len(parts) == len(PARTS)
    for span in parts:
        assert server.start_time is not None
        assert server.end_time is not None
        assert server.start_time <= (span.start_time or 0) <= (span.end_time or 0)
        assert (span.end_time or 0) <= server.end_time


async def test_prompts_are_traced_only_if_configured(backend: TracedBackend) -> None:
    gateway_config = CONFIG.gateway.model_copy(update={"log_prompts": True})
    gateway = Gateway(backend, CONFIG.model_copy(update={"gateway": gateway_config}))
    await gateway.post()
    assert attributes(gateway.server)["diffusion_serve.prompt"] == "secret"


async def test_the_log_line_names_the_trace(
    backend: TracedBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "serve_app.gateway.requests_log")
    await Gateway(backend).post({"traceparent": PARENT})
    [line] = [one for one in caplog.records if one.name == "serve_app.gateway.requests_log"]
    assert vars(line)["trace_id"] == TRACE_ID
