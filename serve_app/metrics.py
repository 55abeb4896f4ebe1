"""Every metric, declared once: name, unit, labels, buckets.

In the default registry of the process that sets them.
"""

from prometheus_client import Counter, Enum, Gauge, Histogram

SHARING = Enum(
    "diffusion_serve_sharing",
    "How requests share the pipeline, as far as pictures came out the same at start-up.",
    ["model"],
    states=["batched", "interleaved", "alone"],
)

SHARING_DIFFERENCE = Gauge(
    "diffusion_serve_sharing_difference",
    "Largest difference of a pixel in [0, 1] between batched and alone at start-up.",
    ["model"],
)

FORECAST_ERROR = Histogram(
    "diffusion_serve_forecast_error_ratio",
    "By how much the predicted time of a finished request was off, as a share of the time it took.",
    ["model"],
    buckets=(0.02, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0),
)

COLD_START = Gauge(
    "diffusion_serve_cold_start_seconds",
    "How long the last start of the engine took, by phase; the phases add up to the whole.",
    ["model", "phase"],
)

REFUSALS = Counter(
    "diffusion_serve_refusals_total",
    "Requests that an engine did not take in, by the limit that they would have broken.",
    ["model", "reason"],
)

BACKLOG = Gauge(
    "diffusion_serve_backlog_seconds",
    "Predicted seconds to finish all accepted work of a class.",
    ["model", "priority"],
)

HELD = Gauge(
    "diffusion_serve_held_requests",
    "Requests that wait in this gateway replica for a replica that is starting, refused by others.",
)
