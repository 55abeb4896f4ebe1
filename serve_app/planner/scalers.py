"""The scaling policies that the simulator compares, behind one interface."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from serve_app.autoscaling.policy import Load, PolicyState, ScalingParams, decide
from serve_app.planner.serve_policy import QueueParams, QueuePolicy
from serve_app.protocol.load import ReplicaLoad


class Scaler(Protocol):
    """A scaling policy, called once per report."""

    def decide(self, cluster: "ClusterView") -> tuple[int, str]:
        """Return the number of replicas and the reason in one word."""
        ...


@dataclass(frozen=True)
class ClusterView:
    """The data that a scaling policy may use."""

    at_s: float
    running: int
    target: int
    replicas: Sequence[ReplicaLoad]
    requests: int
    """Unfinished requests, accepted or waiting."""
    queued: int
    """Requests among them that wait for a replica."""


class Fixed:
    """A constant number of replicas."""

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas

    def decide(self, cluster: ClusterView) -> tuple[int, str]:
        return self._replicas, "fixed"


class ByCount:
    """Ray Serve's default policy, on the periodic reports of handles."""

    def __init__(self, params: QueueParams) -> None:
        self._params = params
        self._policy = QueuePolicy(params)
        self._seen: deque[tuple[float, int]] = deque()
        self._reported_at = -math.inf
        self._reported = 0.0

    def decide(self, cluster: ClusterView) -> tuple[int, str]:
        now, seen = cluster.at_s, self._seen
        seen.append((now, cluster.requests))
        while seen[0][0] <= now - self._params.look_back_period_s:
            seen.popleft()
        if now - self._reported_at >= self._params.metrics_interval_s:
            self._reported_at = now
            self._reported = sum(requests for _, requests in seen) / len(seen)
        number = self._policy.decide(now, cluster.running, cluster.target, self._reported)
        return number, "count"


class ByWork:
    """The policy of this project."""

    def __init__(self, params: ScalingParams) -> None:
        self._params = params
        self._state = PolicyState()

    def decide(self, cluster: ClusterView) -> tuple[int, str]:
        if cluster.running == 0 and cluster.requests > 0:
            # Serve calls no policy before the first replica runs.
            return max(1, cluster.target), "cold"
        load = Load(
            cluster.at_s,
            cluster.running,
            cluster.target,
            cluster.replicas,
            cluster.queued,
        )
        decision, self._state = decide(load, self._params, self._state)
        return decision.replicas, decision.term
