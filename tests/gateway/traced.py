"""A gateway with tracing, and the spans that it made."""

import itertools
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import httpx
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import Sampler
from opentelemetry.trace import (
    SpanKind,
)

from serve_app.config.models import AppConfig
from serve_app.gateway.auth import KeyRing
from serve_app.gateway.routes import create_api
from serve_app.gateway.tracing import Tracing
from serve_app.protocol.backend import GenerationEvent
from serve_app.protocol.events import GenerationTimings, Queued, Step, Timeline
from serve_app.protocol.images import EncodedImage, Encoding
from serve_app.protocol.params import INITIAL, GenerationParams, RequestContext
from tests.fakes.backend import CONFIG, FakeBackend

PATH = "/v1/images/generations"


TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


PARENT_ID = "b7ad6b7169203331"


PARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"


PEERS = tuple(f"00-{number:032x}-{number:016x}-01" for number in (1, 2))


PARTS_S = (1e-5, 2e-5, 4e-5, 1e-5)
"""Durations that are shorter than any request."""


STEPS = (Step(1e-5, 1), Step(2e-5, 3), Step(4e-5, 2))


class TracedBackend(FakeBackend):
    """Reports timelines like an engine with a traced request."""

    def __init__(self) -> None:
        super().__init__()
        self.timeline: Timeline | None = None
        """Timeline that is sent after `Queued`."""

    async def generate(
        self,
        params: GenerationParams,
        encoding: Encoding,
        progress: bool = False,
        context: RequestContext = INITIAL,
    ) -> AsyncGenerator[GenerationEvent, None]:
        generating = super().generate(params, encoding, progress, context)
        async with aclosing(generating) as events:
            async for event in events:
                if isinstance(event, EncodedImage):
                    event = replace(
                        event,
                        timings=GenerationTimings(*PARTS_S),
                        timeline=Timeline(PARTS_S[:3], STEPS, PEERS) if context.trace else None,
                        age_s=sum(PARTS_S),
                    )
                elif isinstance(event, Queued):
                    event = replace(event, replica="engine-1", number=12)
                yield event
                if isinstance(event, Queued) and self.timeline is not None:
                    yield self.timeline


class Gateway:
    """A gateway with tracing, and its spans."""

    def __init__(
        self,
        backend: FakeBackend,
        config: AppConfig = CONFIG,
        sampler: Sampler | None = None,
    ) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        tracing = Tracing(config, provider)
        self.api = create_api(config, backend, KeyRing(None, None), traced=tracing.middleware)

    async def post(
        self, headers: Mapping[str, str] | list[tuple[str, str]] | None = None, **body: Any
    ) -> httpx.Response:
        transport = httpx.ASGITransport(self.api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(PATH, json={"prompt": "secret"} | body, headers=headers)

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    @property
    def server(self) -> ReadableSpan:
        [span] = [one for one in self.spans if one.kind is SpanKind.SERVER]
        return span

    def below(self, parent: ReadableSpan) -> list[ReadableSpan]:
        """Return the spans in the order of their start."""
        of_it = [
            one
            for one in self.spans
            if one.parent and one.parent.span_id == context(parent).span_id
        ]
        return sorted(of_it, key=lambda one: (one.start_time, one.end_time))


def context(span: ReadableSpan) -> Any:
    assert span.context is not None
    return span.context


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def names(spans: list[ReadableSpan]) -> list[str]:
    return [span.name for span in spans]


def assert_fills(parts: list[ReadableSpan], start: int | None, end: int | None) -> None:
    """Check that the parts follow each other, from beginning to end."""
    for before, after in itertools.pairwise(parts):
        assert before.end_time == after.start_time
    assert (parts[0].start_time, parts[-1].end_time) == (start, end)
