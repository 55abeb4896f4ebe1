"""Ray Serve's default policy, by the count of requests, as a baseline for the simulator.

The arithmetic is that of `ray.serve.autoscaling_policy` in Ray 2.60, without Ray. A test compares
the two.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class QueueParams:
    """Serve's ``autoscaling_config`` with its shipped settings."""

    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: float = 2.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    look_back_period_s: float = 30.0
    """Window over which requests are averaged."""
    metrics_interval_s: float = 10.0
    """Interval of the reports by handles and replicas."""


@dataclass
class QueuePolicy:
    """The policy with its state: since when it has decided up or down."""

    params: QueueParams
    _direction: int = 0
    _since_s: float = 0.0

    def decide(self, at_s: float, running: int, target: int, requests: float) -> int:
        """Return the number of replicas. ``requests``: mean number of unfinished requests."""
        params = self.params
        if running == 0:
            return max(1, target) if requests > 0 else self._bounded(target)
        wanted = math.ceil(requests / params.target_ongoing_requests)
        direction = (wanted > target) - (wanted < target)
        if direction != self._direction:
            self._direction, self._since_s = direction, at_s
        if direction == 0:
            return self._bounded(target)
        delay_s = params.upscale_delay_s if direction > 0 else params.downscale_delay_s
        if direction < 0 and target > 1:
            wanted = max(1, wanted)
        if at_s - self._since_s + 1e-6 < delay_s:
            return self._bounded(target)
        self._direction = 0
        return self._bounded(wanted)

    def _bounded(self, replicas: int) -> int:
        return max(self.params.min_replicas, min(self.params.max_replicas, replicas))
