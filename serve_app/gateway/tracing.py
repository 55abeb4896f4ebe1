"""OpenTelemetry traces of image requests: a server span each, with child spans for its parts.

Nothing is measured for them. When a request has ended, its spans are made from its
`RequestRecord`, on the gateway's clock, which is read once a request. No other module imports
OpenTelemetry, and this one is imported only where ``gateway.tracing`` is on.
"""

import functools
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Link, Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app import __version__
from serve_app.config.models import AppConfig
from serve_app.gateway.requests_log import RequestRecord
from serve_app.gateway.schemas import RESPONSE
from serve_app.protocol.events import GENERATION_PARTS, Timeline
from serve_app.protocol.params import GenerationParams

logger = logging.getLogger(__name__)

FLUSH_WITHIN_S = 5.0
"""Time to send the last spans when the gateway stops; what is left then is lost."""

_W3C = TraceContextTextMapPropagator()


class Tracing:
    """Makes the spans of a gateway's requests."""

    def __init__(self, config: AppConfig, provider: TracerProvider) -> None:
        self._log_prompts = config.gateway.log_prompts
        self.provider = provider
        self._tracer = provider.get_tracer("serve_app", __version__)

    @classmethod
    def to_collector(cls, config: AppConfig, replica: str) -> "Tracing":
        """Send spans where OpenTelemetry's environment variables direct them.

        A thread sends them from a queue, which drops spans when it is full.
        """
        ours = {
            "service.name": "diffusion-serve",
            "service.version": __version__,
            "service.instance.id": replica,
        }
        resource = Resource.create({**ours, **OTELResourceDetector().detect().attributes})
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(LoggedOnce(OTLPSpanExporter())))
        # It warns of each malformed header that a client sends, and of each span that it drops.
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)
        return cls(config, provider)

    def close(self, within_s: float = FLUSH_WITHIN_S) -> None:
        """Send the spans that are left."""
        flush = threading.Thread(target=self.provider.shutdown, name="flush", daemon=True)
        flush.start()
        flush.join(within_s)

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """Wrap an application, inside a `RequestLog`: every request with a record is traced."""
        return functools.partial(self._serve, app)

    def begin(self, scope: Scope, record: RequestRecord) -> "RequestTrace":
        """Start the span of a request, as part of its client's trace if it has one.

        The record gets it, for the answer, the log and the engine.
        """
        return RequestTrace(self._tracer, scope, record, self._log_prompts)

    async def _serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        record = scope.get("state", {}).get("record")
        if not isinstance(record, RequestRecord):
            await app(scope, receive, send)
            return
        traced = self.begin(scope, record)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                traced.answered(message["status"])
                if record.traceparent:
                    MutableHeaders(scope=message)["traceparent"] = record.traceparent
            await send(message)

        try:
            await app(scope, receive, answer)
        except Exception as error:
            record.failed(error)
            traced.answered(record.status)  # an outer middleware answers
            raise
        finally:
            traced.end()


class RequestTrace:
    """The spans of one request. All but the first are made when it has ended."""

    def __init__(
        self,
        tracer: trace.Tracer,
        scope: Scope,
        record: RequestRecord,
        log_prompts: bool,
    ) -> None:
        self._tracer = tracer
        self._record = record
        self._log_prompts = log_prompts
        self._arrived_ns = time.time_ns() - round(record.age_s * 1e9)
        self._ended_s = math.inf
        headers = Headers(scope=scope)
        parent = Context()
        if len(headers.getlist("traceparent")) == 1:
            parent = _W3C.extract({name: headers.getlist(name) for name in _W3C.fields}, parent)
        path = scope["path"]  # it has no variables, so it is also the route
        self._server = tracer.start_span(
            f"{scope['method']} {path}",
            parent,
            SpanKind.SERVER,
            {
                "http.request.method": scope["method"],
                "http.route": path,
                "url.path": path,
                "url.scheme": scope.get("scheme", "http"),
                "network.protocol.version": scope.get("http_version", "1.1"),
                "user_agent.original": headers.get("user-agent", "")[:200],
                "gen_ai.request.model": record.model,
                "gen_ai.output.type": "image",
                "diffusion_serve.request_id": record.request_id,
            },
            start_time=self._at(0.0),
        )
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, trace.set_span_in_context(self._server, Context()))
        record.traceparent = carrier.get("traceparent", "")
        record.sampled = self._server.is_recording()

    def answered(self, status: int) -> None:
        """Note the HTTP status of the answer."""
        self._server.set_attribute("http.response.status_code", status)

    def end(self) -> None:
        """Make the spans from the record, which is complete by now."""
        if not self._record.sampled:
            return
        record, span = self._record, self._server
        self._ended_s = record.age_s
        span.set_attribute("gen_ai.request.model", record.model)  # chosen since the start
        span.set_attribute("diffusion_serve.key", record.principal)
        span.set_attribute("diffusion_serve.outcome", record.outcome)
        if record.images:
            first = record.images[0]
            span.set_attribute("gen_ai.request.choice.count", len(record.images))
            span.set_attribute("gen_ai.request.seed", first.seed)
            span.set_attribute("diffusion_serve.size", f"{first.width}x{first.height}")
            span.set_attribute("diffusion_serve.steps", first.steps_to_run)
            if self._log_prompts:
                span.set_attribute("diffusion_serve.prompt", first.prompt)
            generated_s = max([self._image(params) for params in record.images])
            if generated_s < math.inf:
                response = self._child(span, RESPONSE, generated_s)
                self._mark_error(response)
                response.end(self._at(math.inf))
        self._mark_error(span)
        span.end(self._at(math.inf))

    def _image(self, params: GenerationParams) -> float:
        """Make the spans of one image; return when it was generated, or infinity if it was not.

        The part in which an unfinished request ended lasts until that end.
        """
        timeline = self._record.timelines.get(params.seed, Timeline())
        parent, several = self._server, len(self._record.images) > 1
        if several:
            parent = self._child(parent, "image", 0.0, {"gen_ai.request.seed": params.seed})
        if params.seed in self._record.engine_requests:
            replica, _ = self._record.engine_requests[params.seed]
            parent.set_attribute("diffusion_serve.replica", replica)
        at_s = 0.0
        for part, took_s in zip(GENERATION_PARTS, (*timeline.parts_s, math.inf), strict=False):
            if part == "denoise":
                span = self._denoising(parent, timeline, at_s)
            else:
                span = self._child(parent, part, at_s)
            at_s += took_s
            if at_s == math.inf:
                self._mark_error(span)
                span.set_attribute("diffusion_serve.outcome", self._record.outcome)
            span.end(self._at(at_s))
            if at_s == math.inf:
                break
        if several:
            parent.end(self._at(at_s))
        return at_s

    def _denoising(self, parent: Span, timeline: Timeline, start_s: float) -> Span:
        """Start the denoise span, with an event for each step and links to batch peers."""
        links = [Link(_context(peer)) for peer in timeline.peers]
        span = self._child(parent, "denoise", start_s, links=links)
        for number, step in enumerate(timeline.steps, 1):
            span.add_event(
                "step",
                {"diffusion_serve.step": number, "diffusion_serve.batch_size": step.batch_size},
                self._at(start_s + step.ended_s),
            )
        return span

    def _child(
        self,
        parent: Span,
        name: str,
        start_s: float,
        attributes: Mapping[str, AttributeValue] | None = None,
        links: Sequence[Link] = (),
    ) -> Span:
        context = trace.set_span_in_context(parent, Context())
        start_ns = self._at(start_s)
        return self._tracer.start_span(
            name, context, attributes=attributes, links=links, start_time=start_ns
        )

    def _mark_error(self, span: Span) -> None:
        """Mark a server error. By the conventions for HTTP servers, client errors are none."""
        if self._record.status >= 500:
            span.set_status(StatusCode.ERROR, self._record.outcome)
            span.set_attribute("error.type", self._record.outcome)

    def _at(self, seconds: float) -> int:
        """Convert to Unix nanoseconds. Times after the end, from a faster clock, are cut."""
        return self._arrived_ns + round(min(seconds, self._ended_s) * 1e9)


def _context(traceparent: str) -> trace.SpanContext:
    found = _W3C.extract({"traceparent": traceparent}, Context())
    return trace.get_current_span(found).get_span_context()


class LoggedOnce(SpanExporter):
    """A span exporter that logs one warning when exports begin to fail, and one when they recover.

    The exporter itself would log every batch, several times.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._accepted = True
        self._reason = ""
        self._log = logging.getLogger(type(exporter).__module__)
        self._log.setLevel(logging.WARNING)  # it warns at each attempt
        self._log.addFilter(self._note)

    def _note(self, record: logging.LogRecord) -> bool:
        """Keep the first warning of a batch, instead of logging it."""
        self._reason = self._reason or record.getMessage()
        return False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._reason = ""
        result = self._exporter.export(spans)
        accepted = result is SpanExportResult.SUCCESS
        if accepted and not self._accepted:
            logger.info("the trace collector accepts traces again")
        if self._accepted and not accepted:
            logger.warning(
                "the trace collector rejects traces, which are dropped until it accepts them; its "
                "address is in OTEL_EXPORTER_OTLP_ENDPOINT: %s",
                self._reason,
            )
        self._accepted = accepted
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()
        self._log.removeFilter(self._note)
