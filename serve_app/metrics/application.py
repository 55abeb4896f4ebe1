"""Metrics of the application, set by the gateway that answers a scrape."""

from prometheus_client import Gauge

from serve_app.metrics.registry import APPLICATION

REPLICAS = Gauge(
    "diffusion_serve_replicas",
    "Generator replicas by state, as Serve's controller reports them.",
    ["model", "state"],
    registry=APPLICATION,
)

TARGET_REPLICAS = Gauge(
    "diffusion_serve_target_replicas",
    "Generator replicas that Serve's controller aims for.",
    ["model"],
    registry=APPLICATION,
)

SCRAPED = Gauge(
    "diffusion_serve_scraped_replicas",
    "Replicas whose metrics are in this response, and running replicas that did not report.",
    ["model", "deployment", "answer"],
    registry=APPLICATION,
)

SCRAPE = Gauge(
    "diffusion_serve_scrape_seconds",
    "Time to gather the replicas' metrics for this response.",
    ["model"],
    registry=APPLICATION,
)
