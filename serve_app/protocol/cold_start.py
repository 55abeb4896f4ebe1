"""The estimate of the time that a replica takes to start. Standard library only.

The autoscaling policy observes starts in Serve's controller, and each gateway observes them through
the controller's reports. Both use this estimate.
"""

ASSUMED_COLD_START_S = 60.0
"""Duration of a start, in seconds, before one was observed."""

_WEIGHT = 0.3
"""Weight of a new observation against the smoothed duration."""


def smoothed_cold_start(known_s: float | None, took_s: float) -> float:
    """Return the estimate after a start that took ``took_s`` seconds; ``known_s`` is the last."""
    return took_s if known_s is None else known_s + _WEIGHT * (took_s - known_s)
