"""The GPU nodes of a simulated cluster, which the replicas of one or several models share.

One node carries one replica. This module owns the nodes from the request to the return, and the
queue of replicas that wait for one. It knows no requests. `simulator` calls it in order of time.
"""

import math
from bisect import bisect_right, insort
from collections import deque
from operator import itemgetter
from typing import Protocol

from serve_app.planner.cluster import ClusterParams
from serve_app.planner.replica import SimulatedReplica


class Usage:
    """Counts of nodes and of waiting replicas, with their sums over time."""

    def __init__(self) -> None:
        self.nodes = 0
        """Nodes from request to return. An idle node counts for the model that used it last."""
        self.most_nodes = 0
        self.gpu_s = 0.0
        """Paid time of the nodes."""
        self.waiting = 0
        """Replicas that wait for a node."""
        self.waited_s = 0.0
        """Time during which at least one replica waited."""
        self._at_s = 0.0

    def change(self, now: float, nodes: int = 0, waiting: int = 0) -> None:
        """Add the time since the last change to the sums, then change the counts."""
        passed_s = now - self._at_s
        self._at_s = now
        self.gpu_s += self.nodes * passed_s
        if self.waiting:
            self.waited_s += passed_s
        self.nodes += nodes
        self.waiting += waiting
        self.most_nodes = max(self.most_nodes, self.nodes)


class Tenant(Protocol):
    """A model whose replicas take nodes from the pool."""

    usage: Usage
    """Usage by this model alone. The pool updates it."""

    def place(self, replica: SimulatedReplica, now: float) -> None:
        """Start a replica on its node, which is ready at ``replica.node_at``."""
        ...


class NodePool:
    """At most ``limit`` nodes at a time. Replicas that find none wait: first come, first served."""

    def __init__(self, params: ClusterParams, limit: float = math.inf) -> None:
        self.usage = Usage()
        self._params = params
        self._limit = limit
        # (idle since, or ready at; the payer), sorted by time
        self._idle: list[tuple[float, Usage]] = []
        self._waiting: deque[tuple[SimulatedReplica, Tenant]] = deque()

    def add_ready(self, tenant: Tenant, nodes: int) -> None:
        """Give a tenant nodes that are up at time 0."""
        self._count(tenant.usage, 0.0, nodes=nodes)

    def request(self, replica: SimulatedReplica, tenant: Tenant, now: float) -> None:
        """Find a node for a replica, at once or as soon as there is one."""
        self._count(tenant.usage, now, waiting=1)
        self._waiting.append((replica, tenant))
        self._serve_waiting(now)

    def release(self, replica: SimulatedReplica, tenant: Tenant, now: float) -> None:
        """Take back the node of a replica, which may still be booting, or its request for one."""
        if replica.node_at == math.inf:
            self._waiting.remove((replica, tenant))
            self._count(tenant.usage, now, waiting=-1)
        else:
            insort(self._idle, (max(now, replica.node_at), tenant.usage), key=itemgetter(0))
            self._serve_waiting(now)

    def lose(self, tenant: Tenant, now: float) -> None:
        """Remove a node that has failed."""
        self._count(tenant.usage, now, nodes=-1)
        self._serve_waiting(now)

    def return_idle(self, now: float) -> None:
        """Return the nodes that have idled for long enough."""
        idled = bisect_right(self._idle, now - self._params.node_idle_s, key=itemgetter(0))
        for _, payer in self._idle[:idled]:
            self._count(payer, now, nodes=-1)
        del self._idle[:idled]

    def pay(self, tenant: Tenant, now: float) -> None:
        """Bring the sums of a tenant and of the pool up to date."""
        self._count(tenant.usage, now)

    def _serve_waiting(self, now: float) -> None:
        while self._waiting and (self._idle or self.usage.nodes < self._limit):
            replica, tenant = self._waiting.popleft()
            replica.node_at = self._node_at(now)
            self._count(tenant.usage, now, nodes=1, waiting=-1)
            tenant.place(replica, now)

    def _node_at(self, now: float) -> float:
        """Return the time at which a node is ready for a replica: the most recently idle node, a
        booting node without a replica, or a new one."""
        if not self._idle:
            return now + self._params.node_start_s
        there = bisect_right(self._idle, now, key=itemgetter(0))
        node_at, payer = self._idle.pop(max(0, there - 1))
        self._count(payer, now, nodes=-1)
        return node_at

    def _count(self, usage: Usage, now: float, nodes: int = 0, waiting: int = 0) -> None:
        for one in (usage, self.usage):
            one.change(now, nodes, waiting)
