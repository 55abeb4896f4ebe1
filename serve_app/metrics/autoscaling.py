"""Gauges of the autoscaling policy, on Ray's metrics port.

The policy runs in Serve's controller, which has no other port.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RayGauge:
    """A gauge that Ray exports, with ``ray_`` before its name."""

    name: str
    documentation: str
    labels: tuple[str, ...] = ("application", "deployment")


WANTED_REPLICAS = RayGauge(
    "diffusion_serve_autoscaling_desired_replicas", "Replicas that the policy decided on."
)
NEEDED_REPLICAS = RayGauge(
    "diffusion_serve_autoscaling_needed_replicas",
    "Replicas that arriving work or waiting work needs, before scaling down is delayed.",
    ("application", "deployment", "by"),
)
DECISIVE_TERM = RayGauge(
    "diffusion_serve_autoscaling_term",
    "1 for the term that made the decision, 0 for the others.",
    ("application", "deployment", "term"),
)
FORECAST_REPLICAS = RayGauge(
    "diffusion_serve_autoscaling_forecast_replicas",
    "Predicted busy replicas at the time when a replica requested now is ready.",
)
WAITING = RayGauge(
    "diffusion_serve_autoscaling_waiting_seconds", "Waiting work, in seconds of one replica."
)
MEASURED_COLD_START = RayGauge(
    "diffusion_serve_autoscaling_cold_start_seconds",
    "Time from the request for a replica until it generates: measured or configured, longer while "
    "a start is overdue.",
)

RAY_GAUGES = (
    WANTED_REPLICAS,
    NEEDED_REPLICAS,
    DECISIVE_TERM,
    FORECAST_REPLICAS,
    WAITING,
    MEASURED_COLD_START,
)
