"""A collector of traces: takes them over OTLP/HTTP, and keeps them.

``python -m tests.collector`` is one that prints its URL and runs until its input ends.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

HOLD_S = 30.0


class Collector:
    """What came in, batch by batch, while it runs and after that."""

    def __init__(self) -> None:
        self.url = ""
        self.status = 200
        """Of its answers."""
        self.answering = threading.Event()
        """Cleared, it lets whoever sends wait for an answer, for `HOLD_S` at most."""
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
        """The attributes of those who sent something."""
        return [
            values(one.resource.attributes)
            for batch in self.batches
            for one in batch.resource_spans
        ]


def values(attributes: Any) -> dict[str, Any]:
    """As a mapping, of strings and numbers."""

    def value(one: KeyValue) -> Any:
        return getattr(one.value, one.value.WhichOneof("value") or "string_value")

    return {one.key: value(one) for one in attributes}


@contextmanager
def collecting() -> Iterator[Collector]:
    """One that listens on a free port of this machine."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces"
            assert self.headers["content-type"] == "application/x-protobuf"
            collector.batches.append(ExportTraceServiceRequest.FromString(body))
            collector.answering.wait(HOLD_S)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(collector.status)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, name="collector")
        thread.start()
        try:
            yield collector
        finally:
            collector.answering.set()
            server.shutdown()
            thread.join()


if __name__ == "__main__":
    with collecting() as running:
        print(running.url, flush=True)
        sys.stdin.read()
