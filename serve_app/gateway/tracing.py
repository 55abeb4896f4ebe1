"""OpenTelemetry traces of requests for pictures: a server span each, and what it spent its time on.

Nothing is measured for them. When a request has ended, its spans are made from its `Record`: of
what the gateway knows and the engine told, on the gateway's clock, which is read once a request.
The only importer of OpenTelemetry, itself imported only where ``gateway.tracing`` is on.
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
from serve_app.config import AppConfig
from serve_app.gateway.requests_log import Record
from serve_app.gateway.schemas import PARTS
from serve_app.protocol.events import Timeline
from serve_app.protocol.params import GenerationParams

logger = logging.getLogger(__name__)

FLUSH_WITHIN_S = 5.0
"""What is left when the gateway ends, or it is lost."""

_W3C = TraceContextTextMapPropagator()

*_PAINTING, _RESPONSE = PARTS


class Tracing:
    """Makes the spans of a gateway's requests."""

    def __init__(self, config: AppConfig, provider: TracerProvider) -> None:
        self._model = config.model.id
        self._log_prompts = config.gateway.log_prompts
        self._provider = provider
        self._tracer = provider.get_tracer("serve_app", __version__)

    @classmethod
    def to_collector(cls, config: AppConfig, replica: str) -> "Tracing":
        """Spans are sent as OpenTelemetry's variables of the environment say; its SDK reads them.

        In the background, from a queue that drops what is too much for it.
        """
        ours = {
            "service.name": "diffusion-serve",
            "service.version": __version__,
            "service.instance.id": replica,
        }
        resource = Resource.create({**ours, **OTELResourceDetector().detect().attributes})
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(Announced(OTLPSpanExporter())))
        # It warns of each malformed header that a client sends, and of each span that it drops.
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)
        return cls(config, provider)

    def close(self, within_s: float = FLUSH_WITHIN_S) -> None:
        """Send what is left."""
        flush = threading.Thread(target=self._provider.shutdown, name="flush", daemon=True)
        flush.start()
        flush.join(within_s)

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """To be put inside a `Recorder`: what that keeps a `Record` of is traced."""
        return functools.partial(self._serve, app)

    def begin(self, scope: Scope, record: Record) -> "RequestTrace":
        """The span of a request that has just come, continuing its client's trace if it has one.

        It is put on record, for the answer, the log and the engine.
        """
        return RequestTrace(self._tracer, scope, record, self._model, self._log_prompts)

    async def _serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        record = scope.get("state", {}).get("record")
        if not isinstance(record, Record):
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
            traced.answered(record.status)  # further out
            raise
        finally:
            traced.end()


class RequestTrace:
    """The spans of one request. All but the first are made at its end."""

    def __init__(
        self, tracer: trace.Tracer, scope: Scope, record: Record, model: str, log_prompts: bool
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
        path = scope["path"]  # without variables, and so the route as well
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
                "gen_ai.request.model": model,
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
        """What of HTTP the client is told."""
        self._server.set_attribute("http.response.status_code", status)

    def end(self) -> None:
        """Whatever became of the request, its record tells it by now."""
        if not self._record.sampled:
            return
        record, span = self._record, self._server
        self._ended_s = record.age_s
        span.set_attribute("diffusion_serve.key", record.principal)
        span.set_attribute("diffusion_serve.outcome", record.outcome)
        if record.pictures:
            first = record.pictures[0]
            span.set_attribute("gen_ai.request.choice.count", len(record.pictures))
            span.set_attribute("gen_ai.request.seed", first.seed)
            span.set_attribute("diffusion_serve.size", f"{first.width}x{first.height}")
            span.set_attribute("diffusion_serve.steps", first.steps_to_run)
            if self._log_prompts:
                span.set_attribute("diffusion_serve.prompt", first.prompt)
            painted_s = max([self._picture(params) for params in record.pictures])
            if painted_s < math.inf:
                response = self._child(span, _RESPONSE, painted_s)
                self._blame(response)
                response.end(self._at(math.inf))
        self._blame(span)
        span.end(self._at(math.inf))

    def _picture(self, params: GenerationParams) -> float:
        """The spans of one picture; when it was painted, without end if it was not.

        The part in which its request ended before that lasts until then.
        """
        timeline = self._record.timelines.get(params.seed, Timeline())
        parent, several = self._server, len(self._record.pictures) > 1
        if several:
            parent = self._child(parent, "picture", 0.0, {"gen_ai.request.seed": params.seed})
        if params.seed in self._record.engine_requests:
            replica, _ = self._record.engine_requests[params.seed]
            parent.set_attribute("diffusion_serve.replica", replica)
        at_s = 0.0
        for part, took_s in zip(_PAINTING, (*timeline.parts_s, math.inf), strict=False):
            if part == "denoise":
                span = self._denoising(parent, timeline, at_s)
            else:
                span = self._child(parent, part, at_s)
            at_s += took_s
            if at_s == math.inf:
                self._blame(span)
                span.set_attribute("diffusion_serve.outcome", self._record.outcome)
            span.end(self._at(at_s))
            if at_s == math.inf:
                break
        if several:
            parent.end(self._at(at_s))
        return at_s

    def _denoising(self, parent: Span, timeline: Timeline, start_s: float) -> Span:
        """With an event for each step, and links to those who shared one."""
        links = [Link(_context(mate)) for mate in timeline.peers]
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

    def _blame(self, span: Span) -> None:
        """Only what is our fault is an error, as the conventions for HTTP servers have it."""
        if self._record.status >= 500:
            span.set_status(StatusCode.ERROR, self._record.outcome)
            span.set_attribute("error.type", self._record.outcome)

    def _at(self, seconds: float) -> int:
        """In Unix time, in nanoseconds; what a clock that runs faster puts after the end is cut."""
        return self._arrived_ns + round(min(seconds, self._ended_s) * 1e9)


def _context(traceparent: str) -> trace.SpanContext:
    found = _W3C.extract({"traceparent": traceparent}, Context())
    return trace.get_current_span(found).get_span_context()


class Announced(SpanExporter):
    """Says once that spans are not taken, and once that they are again.

    The exporter itself would say so of every batch, several times.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._taken = True
        self._complaint = ""
        self._log = logging.getLogger(type(exporter).__module__)
        self._log.setLevel(logging.WARNING)  # of each attempt
        self._log.addFilter(self._note)

    def _note(self, record: logging.LogRecord) -> bool:
        """Instead of the log: the first complaint of a batch says what is wrong."""
        self._complaint = self._complaint or record.getMessage()
        return False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._complaint = ""
        result = self._exporter.export(spans)
        taken = result is SpanExportResult.SUCCESS
        if taken and not self._taken:
            logger.info("traces are taken again")
        if self._taken and not taken:
            logger.warning(
                "traces are not taken, and dropped until they are; OTEL_EXPORTER_OTLP_ENDPOINT "
                "says where they go: %s",
                self._complaint,
            )
        self._taken = taken
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()
        self._log.removeFilter(self._note)
