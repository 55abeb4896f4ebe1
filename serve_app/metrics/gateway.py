"""Metrics of a gateway replica: requests as clients see them."""

from prometheus_client import Counter, Gauge, Histogram, Info

from serve_app.metrics.engine import REJECTIONS
from serve_app.metrics.registry import GATEWAY

WAITS_S = (0.1, 0.25, 0.5, 1.0, 1.5, 2.5, 4.0, 6.0, 10.0, 15.0, 25.0, 40.0, 60.0, 120.0, 300.0)
"""Buckets for the waits of clients."""

PARTS_S = (0.01, 0.03, *WAITS_S)
"""Buckets for the parts of a request."""

REQUESTS = Counter(
    "diffusion_serve_requests_total",
    "HTTP requests for images that have ended.",
    ["model", "key", "priority", "outcome"],
    registry=GATEWAY,
)

OPEN_REQUESTS = Gauge(
    "diffusion_serve_open_requests",
    "HTTP requests for images that have arrived and not ended, wherever they wait.",
    ["model", "priority"],
    registry=GATEWAY,
)

REQUEST = Histogram(
    "diffusion_serve_request_seconds",
    "Time from the arrival of an image request at the gateway to the last byte of its response, if "
    "it completed.",
    ["model"],
    buckets=WAITS_S,
    registry=GATEWAY,
)

REQUEST_PART = Histogram(
    "diffusion_serve_request_part_seconds",
    "Duration of each part of a completed request; the parts add up to the total.",
    ["model", "part"],
    buckets=PARTS_S,
    registry=GATEWAY,
)

FIRST_PARTIAL = Histogram(
    "diffusion_serve_first_partial_seconds",
    "Time from the arrival of a request to its first preview.",
    ["model"],
    buckets=WAITS_S,
    registry=GATEWAY,
)

WAITING_FOR_REPLICA = Gauge(
    "diffusion_serve_requests_waiting_for_replica",
    "Rejected requests that wait in this gateway replica for a starting generator replica.",
    ["model"],
    registry=GATEWAY,
)

GATEWAY_INFO = Info(
    "diffusion_serve_gateway",
    "Version and host of a gateway replica.",
    ["model", "version", "node"],
    registry=GATEWAY,
)

GATEWAY.register(REJECTIONS)  # the gateway counts rejections of requests that reach no engine
