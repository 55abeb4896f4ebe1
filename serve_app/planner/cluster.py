"""The parameters and the results of a simulation."""

import math
from dataclasses import dataclass, field
from typing import Literal

Routing = Literal["count", "work"]
"""Routing rule: the replica with fewer requests, or the one with less work."""


@dataclass(frozen=True)
class ClusterParams:
    """The simulated cluster. Times in seconds."""

    node_start_s: float = 60.0
    """Time from requesting a GPU node until replicas can start on it."""
    replica_start_s: float = 30.0
    """Time from there until the replica can generate: weights and warm-up."""
    node_idle_s: float = 60.0
    """Time that a node without a replica is kept and paid."""
    report_every_s: float = 1.0
    """Interval of reports and of decisions."""
    failures_per_hour: float = 0.0
    """Failures of one running replica: its node is lost, and its requests move to others."""
    routing: Routing = "count"
    choices: int = 8
    """Replicas drawn for each request, of which one is chosen. Serve's own router draws two."""
    slo_scale: float = 3.0
    """Deadline of a request, in multiples of its solo seconds."""
    max_running: int = 32
    """Requests that a replica runs at once; the others wait."""
    max_backlog_s: float = math.inf
    """Predicted backlog above which a replica rejects requests."""
    seed: int = 1


@dataclass
class Sample:
    """The state of the cluster at one moment."""

    at_s: float
    offered: float
    """Arriving work, in replicas that it keeps busy."""
    running: int
    target: int
    nodes: int
    backlog_s: float
    term: str


@dataclass
class SimulationOutcome:
    """The result of one policy on one trace."""

    requests: int = 0
    on_time: int = 0
    rejected: int = 0
    gpu_s: float = 0.0
    """Paid node time, from request to return."""
    gpu_wait_s: float = 0.0
    """Time during which a replica waited for a GPU of the shared pool."""
    work_s: float = 0.0
    """Solo seconds of all requests."""
    lost_replicas: int = 0
    scale_ups: int = 0
    waits_s: list[float] = field(default_factory=list)
    """Time from arrival to end of each finished request."""
    samples: list[Sample] = field(default_factory=list)

    @property
    def attainment(self) -> float:
        """Share of all requests that finished before their deadlines."""
        return self.on_time / self.requests if self.requests else 1.0

    @property
    def gpu_hours(self) -> float:
        return self.gpu_s / 3_600
