"""Simulates a cluster: the engine's scheduler on every replica, and a policy that scales them.

Each replica uses the engine's own scheduler, on costs from the file that the engine writes. A
scaling policy gets the data that Serve would pass to it, with the same delay.

Simplifications: text encoding is part of a request's first step, decoding of its last. The
scheduler decides, and throughput is measured, after half a second of steps or at an arrival, not
after every step. Predictions are exact. Arrival rate and mean work are measured for all
replicas of a model. Rejected clients do not retry.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from random import Random

from serve_app.engine.scheduling.cost import CostModel
from serve_app.engine.scheduling.queue import RankedPolicy
from serve_app.planner.cluster import ClusterParams, Sample, SimulationOutcome
from serve_app.planner.nodes import NodePool, Usage
from serve_app.planner.replica import SimulatedReplica, SimulatedRequest, costs
from serve_app.planner.scalers import ClusterView, Scaler
from serve_app.planner.trace import Trace
from serve_app.protocol.load import ReplicaLoad

RATE_WINDOW_S = 30.0
"""Time over which the arrival rate is measured."""


class Simulator:
    """The replay of one trace under one scaling policy, on nodes of its own or of a shared pool."""

    def __init__(
        self,
        trace: Trace,
        model: CostModel,
        scheduler: Callable[[], RankedPolicy],
        scaler: Scaler,
        params: ClusterParams,
        initial_replicas: int,
        pool: NodePool | None = None,
    ) -> None:
        self.usage = Usage()
        self._pool = NodePool(params) if pool is None else pool
        self._trace = trace
        self._costs = costs(model, trace.kinds)
        self._scheduler = scheduler
        self._scaler = scaler
        self._params = params
        self._rng = Random(params.seed)
        self._random = self._rng.random
        self._events: list[tuple[float, int, int, SimulatedReplica]] = []
        self._order = count()
        self._up: list[SimulatedReplica] = []
        self._starting: list[SimulatedReplica] = []
        self._leaving: set[SimulatedReplica] = set()
        self._waiting: deque[SimulatedRequest] = deque()
        self._outstanding = 0
        self._target = initial_replicas
        self._outcome = SimulationOutcome(requests=len(trace.at_s))
        self._offered: deque[tuple[float, float]] = deque()
        self._offered_s = 0.0
        self._mean_work_s = 0.0
        self._index = 0  # of the next arrival
        self._arrival_at = trace.at_s[0] if trace.at_s else math.inf
        self._report_at = params.report_every_s
        self._pool.add_ready(self, initial_replicas)
        for _ in range(initial_replicas):
            self._up.append(SimulatedReplica(scheduler(), node_at=0.0))

    @property
    def is_busy(self) -> bool:
        """True until all requests are done."""
        return self._arrival_at < math.inf or self._outstanding > 0

    @property
    def next_at(self) -> float:
        """Time of the next arrival, event or report."""
        event_at = self._events[0][0] if self._events else math.inf
        return min(self._arrival_at, event_at, self._report_at)

    def run(self) -> SimulationOutcome:
        """Run until all requests are done. The cluster is paid until then."""
        now = 0.0
        while self.is_busy:
            now = self.step()
        return self.end(now)

    def step(self) -> float:
        """Process the next arrival, event or report. Return its time."""
        arrival_at, report_at = self._arrival_at, self._report_at
        event_at = self._events[0][0] if self._events else math.inf
        if arrival_at <= event_at and arrival_at <= report_at:
            self._arrive(arrival_at)
            return arrival_at
        if event_at <= report_at:
            _, _, turn, replica = heapq.heappop(self._events)
            if turn < 0:
                self._ready(replica, event_at)
            elif turn == replica.turn and replica.batch:
                self._end_steps(replica, event_at)
            return event_at
        self._report_at += self._params.report_every_s
        self._report(report_at)
        return report_at

    def end(self, now: float) -> SimulationOutcome:
        """Return the result. The nodes are paid until now."""
        self._pool.pay(self, now)
        self._outcome.gpu_s = self.usage.gpu_s
        self._outcome.gpu_wait_s = self.usage.waited_s
        return self._outcome

    # ---- requests --------------------------------------------------------------------------------

    def _arrive(self, now: float) -> None:
        at_s, index = self._trace.at_s, self._index
        kind = self._trace.kinds[index]
        cost = self._costs[kind]
        self._index += 1
        self._arrival_at = at_s[index + 1] if index + 1 < len(at_s) else math.inf
        self._outcome.work_s += cost.solo_s
        self._offered.append((now, cost.solo_s))
        self._offered_s += cost.solo_s
        self._outstanding += 1
        self._send(SimulatedRequest(now, kind, cost, self._params.slo_scale, index), now)

    def _send(self, request: SimulatedRequest, now: float) -> None:
        up = self._up
        if not up:
            self._waiting.append(request)
            return
        replica = self._choose(now)
        limit = self._params.max_backlog_s
        if limit < math.inf and replica.batch and replica.backlog_s(now) > limit:
            if self._starting:
                self._waiting.append(request)
            else:
                self._outcome.rejected += 1
                self._outstanding -= 1
            return
        self._accept(replica, request, now)

    def _send_waiting(self, now: float) -> None:
        """Retry the waiting requests: once a second, and when a first replica is ready."""
        for _ in range(len(self._waiting)):
            self._send(self._waiting.popleft(), now)

    def _choose(self, now: float) -> SimulatedReplica:
        up = self._up
        number, choices = len(up), self._params.choices
        if number == 1:
            return up[0]
        if choices == 2 and number > 2:
            first = int(self._random() * number)
            second = int(self._random() * (number - 1))
            drawn = [up[first], up[second + (second >= first)]]
        else:
            drawn = self._rng.sample(up, min(choices, number))
        if self._params.routing == "count":
            return min(drawn, key=lambda replica: len(replica.by_number))
        return min(drawn, key=lambda replica: replica.backlog_s(now))

    def _accept(self, replica: SimulatedReplica, request: SimulatedRequest, now: float) -> None:
        entry = request.entry
        replica.by_number[entry.request] = request
        replica.work_s += request.cost.solo_s
        replica.policy.add(entry)
        if replica.running < self._params.max_running:
            replica.running += 1
            self._park(replica, request)
        else:
            replica.waiting.append(request)
        if not replica.batch:
            self._begin_steps(replica, now)
        elif replica.steps > 1:
            # The running requests finish this step, and then the scheduler decides again.
            done = max(1, math.ceil((now - replica.begins_at - replica.extra_s) / replica.step_s))
            if done < replica.steps:
                replica.steps = done
                self._schedule_end(replica)

    def _park(self, replica: SimulatedReplica, request: SimulatedRequest) -> None:
        entry, cost = request.entry, request.cost
        entry.step_s = cost.step_s[0] * min(request.steps_left, cost.leap)
        replica.policy.park(entry)

    def _begin_steps(self, replica: SimulatedReplica, now: float) -> None:
        chosen = replica.policy.choose(now, replica)
        by_number = replica.by_number
        leader = by_number[chosen[0].request]
        cost = leader.cost
        steps = cost.leap
        extra_s = 0.0
        for entry in chosen:
            request = by_number[entry.request]
            if request.steps_left < steps:
                steps = request.steps_left
            if request.steps_left == request.kind.steps:
                extra_s += cost.before_s
        replica.batch = chosen
        replica.begins_at = now
        replica.steps = steps
        replica.step_s = cost.step_s[len(chosen) - 1]
        replica.saved_s = len(chosen) * cost.step_s[0] - replica.step_s
        replica.extra_s = extra_s
        self._schedule_end(replica)

    def _schedule_end(self, replica: SimulatedReplica) -> None:
        replica.turn += 1
        steps = replica.steps
        end_at = replica.begins_at + replica.extra_s + steps * replica.step_s
        by_number = replica.by_number
        for entry in replica.batch:
            request = by_number[entry.request]
            if request.steps_left == steps:
                end_at += request.cost.after_s
        heapq.heappush(self._events, (end_at, next(self._order), replica.turn, replica))

    def _end_steps(self, replica: SimulatedReplica, now: float) -> None:
        steps, by_number = replica.steps, replica.by_number
        batch, replica.batch = replica.batch, []
        step_s = steps * replica.step_s
        replica.throughput.called(step_s + steps * replica.saved_s, step_s)
        replica.throughput.busy(now - replica.begins_at)
        for entry in batch:
            request = by_number[entry.request]
            cost = request.cost
            done_s = steps * cost.step_s[0]
            if request.steps_left == request.kind.steps:
                done_s += cost.before_s
            request.steps_left -= steps
            if request.steps_left:
                entry.remaining_s -= done_s
                replica.work_s -= done_s
                self._park(replica, request)
                continue
            replica.work_s -= entry.remaining_s
            replica.policy.drop(entry)
            del by_number[entry.request]
            self._outstanding -= 1
            outcome = self._outcome
            outcome.waits_s.append(now - request.at_s)
            if now <= request.deadline_at:
                outcome.on_time += 1
            if replica.waiting:
                entries = {one.entry: one for one in replica.waiting}
                chosen = entries[replica.policy.first(list(entries), now)]
                replica.waiting.remove(chosen)
                self._park(replica, chosen)
            else:
                replica.running -= 1
        if by_number:
            self._begin_steps(replica, now)
        else:
            replica.work_s = 0.0
            if replica in self._leaving:
                self._leaving.discard(replica)
                self._pool.release(replica, self, now)

    # ---- machines --------------------------------------------------------------------------------

    def _report(self, now: float) -> None:
        while self._offered and self._offered[0][0] < now - RATE_WINDOW_S:
            self._offered_s -= self._offered.popleft()[1]
        if self._offered:
            mean_s = self._offered_s / len(self._offered)
            self._mean_work_s += 0.1 * (mean_s - self._mean_work_s)
        self._send_waiting(now)
        self._fail(now)
        self._pool.return_idle(now)
        up = self._up
        rate = self._offered_s / min(RATE_WINDOW_S, max(1.0, now)) / max(1, len(up))
        loads = [
            ReplicaLoad(replica.backlog_s(now), rate, replica.throughput.value(), self._mean_work_s)
            for replica in up
        ]
        view = ClusterView(
            now,
            len(up),
            self._target,
            loads,
            self._outstanding,
            len(self._waiting),
        )
        target, term = self._scaler.decide(view)
        self._scale(target, now)
        self._outcome.samples.append(
            Sample(
                now,
                rate * len(up),
                len(up),
                self._target,
                self.usage.nodes,
                sum(load.backlog_s for load in loads),
                term,
            )
        )

    def _scale(self, target: int, now: float) -> None:
        if target > self._target:
            self._outcome.scale_ups += 1
        self._target = target
        while len(self._up) + len(self._starting) < target:
            self._start(now)
        while len(self._up) + len(self._starting) > target:
            if self._starting:
                self._pool.release(self._starting.pop(), self, now)
            else:
                self._leave(self._up.pop(), now)

    def _start(self, now: float) -> None:
        replica = SimulatedReplica(self._scheduler())
        self._starting.append(replica)
        self._pool.request(replica, self, now)

    def place(self, replica: SimulatedReplica, now: float) -> None:
        """Start a replica on its node. The pool calls this."""
        ready_at = max(now, replica.node_at) + self._params.replica_start_s
        heapq.heappush(self._events, (ready_at, next(self._order), -1, replica))

    def _ready(self, replica: SimulatedReplica, now: float) -> None:
        if replica not in self._starting:
            return  # cancelled before it was ready
        self._starting.remove(replica)
        self._up.append(replica)
        if len(self._up) == 1:
            self._send_waiting(now)

    def _leave(self, replica: SimulatedReplica, now: float) -> None:
        if replica.by_number:
            self._leaving.add(replica)
        else:
            self._pool.release(replica, self, now)

    def _fail(self, now: float) -> None:
        each = self._params.failures_per_hour * self._params.report_every_s / 3_600
        if not each:
            return
        for replica in [one for one in self._up if self._random() < each]:
            self._up.remove(replica)
            self._pool.lose(self, now)
            self._outcome.lost_replicas += 1
            replica.turn += 1
            replica.batch = []
            for request in replica.by_number.values():
                request.restart(now)
                self._send(request, now)


def run_together(simulators: Sequence[Simulator]) -> list[SimulationOutcome]:
    """Run simulators that share a pool of nodes until the requests of all are done.

    Until then, all of them scale and pay. Of two at the same time, the first goes first.
    """
    now = 0.0
    while any(one.is_busy for one in simulators):
        now = min(simulators, key=lambda one: one.next_at).step()
    return [one.end(now) for one in simulators]
