"""An OTLP/HTTP collector that keeps the traces that it receives.

``python -m tests.collector`` runs one: it prints its URL and runs until its input ends.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.fakes.http_server import QuietHandler, serving

HOLD_S = 30.0


class Collector:
    """Received batches of spans; they stay readable after the server has ended."""

    def __init__(self) -> None:
        self.url = ""
        self.status = 200
        """HTTP status of the responses."""
        self.answering = threading.Event()
        """While it is cleared, senders wait for a response, for `HOLD_S` at most."""
        self.answering.set()
        self.batches: list[ExportTraceServiceRequest] = []

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for batch in self.batches
            for resource in batch.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    @property
    def resources(self) -> list[dict[str, Any]]:
        """Attributes of the resources that sent spans."""
        return [
            values(one.resource.attributes)
            for batch in self.batches
            for one in batch.resource_spans
        ]


def values(attributes: Any) -> dict[str, Any]:
    """Return OTLP attributes as a mapping from names to strings and numbers."""

    def value(one: KeyValue) -> Any:
        return getattr(one.value, one.value.WhichOneof("value") or "string_value")

    return {one.key: value(one) for one in attributes}


@contextmanager
def collecting() -> Iterator[Collector]:
    """Run a collector on a free loopback port until the block ends."""
    collector = Collector()

    class Handler(QuietHandler):
        def do_POST(self) -> None:  # noqa: N802  # http.server's name
            body = self.body()
            assert self.path == "/v1/traces"
            assert self.headers["content-type"] == "application/x-protobuf"
            collector.batches.append(ExportTraceServiceRequest.FromString(body))
            collector.answering.wait(HOLD_S)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.respond(collector.status, answer, "application/x-protobuf")

    with serving(Handler) as collector.url:
        try:
            yield collector
        finally:
            collector.answering.set()


if __name__ == "__main__":
    with collecting() as running:
        print(running.url, flush=True)
        sys.stdin.read()
