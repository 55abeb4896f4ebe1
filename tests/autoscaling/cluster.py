"""A simulated cluster that follows the scaling policy second by second."""

import itertools
from collections.abc import Sequence
from random import Random

from serve_app.autoscaling.policy import Load, PolicyState, ScalingParams, decide
from serve_app.protocol.load import ReplicaLoad

WORK_S = 2.0
"""Work of each Poisson arrival."""

SETTLE_S = 900
"""Time after which the number of replicas fits a steady load."""


class Cluster:
    """Replicas that follow the policy, each decision a second after the last."""

    def __init__(self, params: ScalingParams, running: int, cold_start_s: float = 20.0) -> None:
        self.params = params
        self.cold_start_s = cold_start_s
        self.state = PolicyState()
        self.now = 0.0
        self.running = self.target = running
        self.ready_at: list[float] = []
        self.targets = [running]
        self.terms: list[str] = []

    def step(self, busy: float, backlog_s: float = 0.0, known: int | None = None) -> None:
        """``busy``: replicas that arriving work keeps busy; ``known``: the replicas that report."""
        self.now += 1
        self.running += sum(at <= self.now for at in self.ready_at)
        self.ready_at = [at for at in self.ready_at if at > self.now]
        number = self.running if known is None else min(known, self.running)
        each = ReplicaLoad(
            backlog_s / max(1, self.running), busy / max(1, self.running), mean_work_s=2.0
        )
        load = Load(self.now, self.running, self.target, [each] * number)
        decision, self.state = decide(load, self.params, self.state)
        new = decision.replicas - self.target
        self.ready_at += [self.now + self.cold_start_s] * max(0, new)
        for _ in range(max(0, -new)):
            if self.ready_at:
                self.ready_at.pop()
            else:
                self.running -= 1
        self.target = decision.replicas
        self.targets.append(self.target)
        self.terms.append(decision.term)

    @property
    def changes(self) -> list[int]:
        return changes_of(self.targets)


def targets_under_poisson(busy: float, hours: int) -> list[int]:
    """Return the targets of each second under a steady Poisson load, with the default parameters.

    ``busy``: mean number of replicas that the arrivals keep busy. The work is counted over 30 s, as
    replicas do; a cold start takes 90 s.
    """
    rng = Random(1)
    cluster = Cluster(ScalingParams(1, 50), 1, cold_start_s=90.0)
    window, backlog_s = [0.0] * 30, 0.0
    arrives_at = rng.expovariate(busy / WORK_S)
    for second in range(SETTLE_S + hours * 3_600):
        work_s = 0.0
        while arrives_at < second + 1:
            work_s += WORK_S
            arrives_at += rng.expovariate(busy / WORK_S)
        window[second % 30] = work_s
        backlog_s = max(0.0, backlog_s + work_s - cluster.running)
        cluster.step(sum(window) / 30, backlog_s)
    return cluster.targets[SETTLE_S:]


def changes_of(targets: Sequence[int]) -> list[int]:
    """Return the steps by which the targets change."""
    steps = [after - before for before, after in itertools.pairwise(targets)]
    return [step for step in steps if step]
