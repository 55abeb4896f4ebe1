"""The load that one replica reports and the autoscaling policy reads. Standard library only.

A request costs *work*: the seconds that it takes alone on an idle replica (solo seconds).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ReplicaLoad:
    """The load of one running replica."""

    backlog_s: float = 0.0
    """Predicted seconds to finish all accepted interactive work, at the measured throughput."""
    arrival_rate: float = 0.0
    """Solo seconds of interactive work offered per second, averaged over a window.

    Includes rejected requests, but no retries and none that are infeasible on any replica."""
    throughput: float = 1.0
    """Solo seconds of work done per busy second, smoothed: over 1 where batches gain; 1 while
    unknown."""
    mean_work_s: float = 0.0
    """Solo seconds of an interactive request, smoothed; 0 before the first one."""
    batch_backlog_s: float = 0.0
    """The same as ``backlog_s``, for low-priority work, which only fills idle time."""
    utilization: float = 0.0
    """Share of the same window with interactive work. Exported as a metric; no decision uses it."""
