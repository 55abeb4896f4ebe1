"""A cluster in simulated time: the engine's scheduler on every replica, a policy that scales them.

Each replica decides with the scheduler that the engine has, on costs from the same kind of file
that the engine writes; a scaling policy sees what Serve would show it, as late as Serve would.

What is simpler than in reality: text encoding is part of a request's first step, decoding of its
last; the scheduler is asked again, and throughput measured, after half a second of steps, or when a
request comes, rather than after every step; predictions are exact; what arrives, and what a request
takes in the mean, is measured for the cluster as a whole; a client that is refused does not come
again.
"""

import heapq
import math
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Literal, Protocol

from serve_app.autoscaling.policy import Load, PolicyState, ScalingParams, decide
from serve_app.engine.scheduling.cost import CostModel
from serve_app.engine.scheduling.load import Throughput
from serve_app.engine.scheduling.policies import RankedPolicy, Task
from serve_app.planner.serve_policy import QueueParams, QueuePolicy
from serve_app.planner.trace import Kind, Trace
from serve_app.protocol.load import ReplicaLoad

LEAP_S = 0.5
"""Steps are taken together up to this, unless a request comes in between."""

RATE_WINDOW_S = 30.0
"""Over which the arrival of work is measured."""

Routing = Literal["count", "work"]
"""Which of several replicas gets a request: the one with fewer requests, or with less work."""


@dataclass(frozen=True)
class ClusterParams:
    """What the machines do. Times in seconds."""

    node_start_s: float = 60.0
    """From asking for a node with a GPU until replicas can be started on it."""
    replica_start_s: float = 30.0
    """From there until it paints: weights and warm-up."""
    node_idle_s: float = 60.0
    """A node without a replica is kept, and paid, for this long."""
    report_every_s: float = 1.0
    """Figures that a policy sees are this old at most; it decides as often."""
    failures_per_hour: float = 0.0
    """Of one running replica: it is lost with its node, its requests go to others."""
    routing: Routing = "count"
    choices: int = 8
    """Replicas that are drawn for a request, to choose one of them: as `router` has it; Serve's own
    router draws two."""
    slo_scale: float = 3.0
    """Deadline of a request, in multiples of its time alone."""
    max_running: int = 32
    """Requests that a replica paints at once; the others wait their turn."""
    max_backlog_s: float = math.inf
    """A replica that takes longer than this, as predicted, for what it accepted refuses."""
    seed: int = 1


class Scaler(Protocol):
    """Decides once per report how many replicas there should be."""

    def decide(self, cluster: "View") -> tuple[int, str]:
        """The number, and in a word why."""
        ...


@dataclass(frozen=True)
class View:
    """What a scaling policy may look at."""

    at_s: float
    running: int
    target: int
    replicas: Sequence[ReplicaLoad]
    requests: int
    """Accepted or waiting, not done."""
    queued: int
    """Of them, waiting for a replica."""


class Fixed:
    """Always the same number."""

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas

    def decide(self, cluster: View) -> tuple[int, str]:
        return self._replicas, "fixed"


class ByCount:
    """Ray Serve's default policy, on what handles report now and then."""

    def __init__(self, params: QueueParams) -> None:
        self._params = params
        self._policy = QueuePolicy(params)
        self._seen: deque[tuple[float, int]] = deque()
        self._reported_at = -math.inf
        self._reported = 0.0

    def decide(self, cluster: View) -> tuple[int, str]:
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
    """This project's policy."""

    def __init__(self, params: ScalingParams) -> None:
        self._params = params
        self._state = PolicyState()

    def decide(self, cluster: View) -> tuple[int, str]:
        if cluster.running == 0 and cluster.requests > 0:
            # Serve does not ask a policy before the first replica runs.
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


@dataclass
class Sample:
    """The cluster at one moment."""

    at_s: float
    offered: float
    """Work that arrives, in replicas that it keeps busy."""
    running: int
    target: int
    nodes: int
    backlog_s: float
    term: str


@dataclass
class Outcome:
    """What a policy did with a trace."""

    requests: int = 0
    on_time: int = 0
    refused: int = 0
    gpu_s: float = 0.0
    """Of nodes that were paid for, from asking for them to giving them back."""
    work_s: float = 0.0
    """Of all requests, each alone."""
    lost_replicas: int = 0
    scale_ups: int = 0
    waits_s: list[float] = field(default_factory=list)
    """From arrival to end, of those that were painted."""
    samples: list[Sample] = field(default_factory=list)

    @property
    def attainment(self) -> float:
        """Share of all requests that were done before their deadlines."""
        return self.on_time / self.requests if self.requests else 1.0

    @property
    def gpu_hours(self) -> float:
        return self.gpu_s / 3_600


@dataclass(frozen=True)
class Cost:
    """Of one kind of request, looked up once."""

    step_s: tuple[float, ...]
    """Of a call for 1, 2, 3, … requests."""
    cap: int
    before_s: float
    after_s: float
    solo_s: float


def costs(model: CostModel, kinds: Sequence[Kind]) -> dict[Kind, Cost]:
    """What each kind costs, as the engine would predict it."""
    found = {}
    for kind in dict.fromkeys(kinds):
        cap = model.cap(kind.size)
        between_s = model.predict_between(kind.size)
        step_s = tuple(
            model.calls_per_step * (model.predict_call(kind.size, rows) + rows * between_s)
            for rows in range(1, cap + 1)
        )
        before_s, after_s = model.predict_encode(kind.size), model.predict_decode(kind.size)
        solo_s = before_s + kind.steps * step_s[0] + after_s
        found[kind] = Cost(step_s, cap, before_s, after_s, solo_s)
    return found


class _Request:
    __slots__ = ("at_s", "cost", "deadline_at", "kind", "steps_left", "task")

    def __init__(self, at_s: float, kind: Kind, cost: Cost, slo_scale: float, number: int) -> None:
        self.at_s = at_s
        self.kind = kind
        self.cost = cost
        self.deadline_at = at_s + slo_scale * cost.solo_s
        self.steps_left = kind.steps
        self.task = Task(number, self.deadline_at, cost.solo_s, key=kind.size)

    def again(self) -> None:
        """Its replica was lost: from the beginning, with the same deadline."""
        self.steps_left = self.kind.steps
        self.task = Task(self.task.request, self.deadline_at, self.cost.solo_s, key=self.kind.size)


class _Replica:
    """One engine in simulated time."""

    __slots__ = (
        "batch", "begins_at", "by_number", "extra_s", "node_at", "number", "policy", "ready_at",
        "running", "saved_s", "step_s", "steps", "throughput", "turn", "waiting", "work_s",
    )  # fmt: skip

    def __init__(self, number: int, node_at: float, ready_at: float, policy: RankedPolicy) -> None:
        self.number = number
        self.node_at = node_at
        """When its node is there."""
        self.ready_at = ready_at
        self.policy = policy
        self.by_number: dict[int, _Request] = {}
        self.waiting: list[_Request] = []
        self.running = 0
        self.work_s = 0.0
        """Of all that it accepted, each alone; at the end of the running steps it is less."""
        self.throughput = Throughput()
        self.batch: list[Task] = []
        self.begins_at = 0.0
        self.steps = 0
        self.step_s = 0.0
        self.saved_s = 0.0
        """By each of these steps, against one request after the other."""
        self.extra_s = 0.0
        """Before the first and after the last of these steps."""
        self.turn = 0
        """Tells the end of these steps from one that is no longer to come."""

    def backlog_s(self, now: float) -> float:
        """Until all that it accepted is done, at its throughput."""
        if not self.batch:
            return 0.0
        pace = 1 + self.saved_s / self.step_s
        left_s = self.work_s - (now - self.begins_at) * pace
        return max(0.0, left_s) / self.throughput.value()


class Simulator:
    """Replays one trace under one scaling policy."""

    def __init__(
        self,
        trace: Trace,
        model: CostModel,
        scheduler: Callable[[], RankedPolicy],
        scaler: Scaler,
        params: ClusterParams,
        initial_replicas: int,
    ) -> None:
        self._trace = trace
        self._costs = costs(model, trace.kinds)
        self._scheduler = scheduler
        self._scaler = scaler
        self._params = params
        self._rng = Random(params.seed)
        self._random = self._rng.random
        self._numbers = count()
        self._events: list[tuple[float, int, int, _Replica | None]] = []
        self._order = count()
        self._up: list[_Replica] = []
        self._starting: list[_Replica] = []
        self._leaving: set[_Replica] = set()
        self._nodes = 0
        self._idle_nodes: list[float] = []  # since when, or from when they will be there; sorted
        self._paid_at = 0.0
        self._held: deque[_Request] = deque()
        self._outstanding = 0
        self._target = initial_replicas
        self._outcome = Outcome(requests=len(trace.at_s))
        self._offered: deque[tuple[float, float]] = deque()
        self._offered_s = 0.0
        self._mean_work_s = 0.0
        for _ in range(initial_replicas):
            self._nodes += 1
            self._up.append(_Replica(next(self._numbers), 0.0, 0.0, scheduler()))

    def run(self) -> Outcome:
        """Until all is done; the cluster is paid until then."""
        at_s, kinds, total = self._trace.at_s, self._trace.kinds, len(self._trace.at_s)
        slo_scale = self._params.slo_scale
        events, table = self._events, self._costs
        report_s = self._params.report_every_s
        next_report = report_s
        index = 0
        outcome = self._outcome
        next_arrival = at_s[0] if total else math.inf
        now = 0.0
        while index < total or self._outstanding:
            next_event = events[0][0] if events else math.inf
            if next_arrival <= next_event and next_arrival <= next_report:
                now = next_arrival
                kind = kinds[index]
                cost = table[kind]
                request = _Request(now, kind, cost, slo_scale, index)
                index += 1
                next_arrival = at_s[index] if index < total else math.inf
                outcome.work_s += cost.solo_s
                self._offered.append((now, cost.solo_s))
                self._offered_s += cost.solo_s
                self._outstanding += 1
                self._send(request, now)
            elif next_event <= next_report:
                now, _, turn, replica = heapq.heappop(events)
                assert replica is not None
                if turn < 0:
                    self._ready(replica, now)
                elif turn == replica.turn and replica.batch:
                    self._end_steps(replica, now)
            else:
                now = next_report
                next_report += report_s
                self._report(now)
        self._pay(now)
        return outcome

    # ---- requests --------------------------------------------------------------------------------

    def _send(self, request: _Request, now: float) -> None:
        up = self._up
        if not up:
            self._held.append(request)
            return
        replica = self._choose(now)
        limit = self._params.max_backlog_s
        if limit < math.inf and replica.batch and replica.backlog_s(now) > limit:
            if self._starting:
                self._held.append(request)
            else:
                self._outcome.refused += 1
                self._outstanding -= 1
            return
        self._accept(replica, request, now)

    def _send_held(self, now: float) -> None:
        """Gateways look once a second whether there is room, at once whether there is anybody."""
        for _ in range(len(self._held)):
            self._send(self._held.popleft(), now)

    def _choose(self, now: float) -> _Replica:
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

    def _accept(self, replica: _Replica, request: _Request, now: float) -> None:
        task = request.task
        replica.by_number[task.request] = request
        replica.work_s += request.cost.solo_s
        replica.policy.add(task)
        if replica.running < self._params.max_running:
            replica.running += 1
            self._park(replica, request)
        else:
            replica.waiting.append(request)
        if not replica.batch:
            self._begin_steps(replica, now)
        elif replica.steps > 1:
            # Whoever runs goes on to the end of the step; then it is decided anew.
            done = max(1, math.ceil((now - replica.begins_at - replica.extra_s) / replica.step_s))
            if done < replica.steps:
                replica.steps = done
                self._schedule_end(replica)

    def _park(self, replica: _Replica, request: _Request) -> None:
        task, step_s = request.task, request.cost.step_s[0]
        task.step_s = step_s * min(request.steps_left, max(1, int(LEAP_S / step_s)))
        replica.policy.park(task)

    def _begin_steps(self, replica: _Replica, now: float) -> None:
        chosen = replica.policy.choose(now, self._cap_of(replica))
        by_number = replica.by_number
        leader = by_number[chosen[0].request]
        cost = leader.cost
        steps = max(1, int(LEAP_S / cost.step_s[0]))
        extra_s = 0.0
        for task in chosen:
            request = by_number[task.request]
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

    def _schedule_end(self, replica: _Replica) -> None:
        replica.turn += 1
        steps = replica.steps
        end_at = replica.begins_at + replica.extra_s + steps * replica.step_s
        by_number = replica.by_number
        for task in replica.batch:
            request = by_number[task.request]
            if request.steps_left == steps:
                end_at += request.cost.after_s
        heapq.heappush(self._events, (end_at, next(self._order), replica.turn, replica))

    def _cap_of(self, replica: _Replica) -> Callable[[Task, float], int]:
        def cap(leader: Task, within_s: float) -> int:
            request = replica.by_number[leader.request]
            cost = request.cost
            most = cost.cap
            if most == 1:
                return 1
            # Of one step, as ``within_s`` is of several.
            within_s *= cost.step_s[0] / leader.step_s
            while most > 1 and cost.step_s[most - 1] > within_s:
                most -= 1
            return most

        return cap

    def _end_steps(self, replica: _Replica, now: float) -> None:
        steps, by_number = replica.steps, replica.by_number
        batch, replica.batch = replica.batch, []
        step_s = steps * replica.step_s
        replica.throughput.called(step_s + steps * replica.saved_s, step_s)
        replica.throughput.busy(now - replica.begins_at)
        for task in batch:
            request = by_number[task.request]
            cost = request.cost
            done_s = steps * cost.step_s[0]
            if request.steps_left == request.kind.steps:
                done_s += cost.before_s
            request.steps_left -= steps
            if request.steps_left:
                task.remaining_s -= done_s
                replica.work_s -= done_s
                self._park(replica, request)
                continue
            replica.work_s -= task.remaining_s
            replica.policy.drop(task)
            del by_number[task.request]
            self._outstanding -= 1
            outcome = self._outcome
            outcome.waits_s.append(now - request.at_s)
            if now <= request.deadline_at:
                outcome.on_time += 1
            if replica.waiting:
                tasks = {one.task: one for one in replica.waiting}
                chosen = tasks[replica.policy.first(list(tasks), now)]
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
                self._free_node(replica, now)

    # ---- machines --------------------------------------------------------------------------------

    def _report(self, now: float) -> None:
        self._pay(now)
        while self._offered and self._offered[0][0] < now - RATE_WINDOW_S:
            self._offered_s -= self._offered.popleft()[1]
        if self._offered:
            mean_s = self._offered_s / len(self._offered)
            self._mean_work_s += 0.1 * (mean_s - self._mean_work_s)
        self._send_held(now)
        self._fail(now)
        idled = bisect_right(self._idle_nodes, now - self._params.node_idle_s)
        del self._idle_nodes[:idled]
        self._nodes -= idled
        up = self._up
        rate = self._offered_s / min(RATE_WINDOW_S, max(1.0, now)) / max(1, len(up))
        loads = [
            ReplicaLoad(replica.backlog_s(now), rate, replica.throughput.value(), self._mean_work_s)
            for replica in up
        ]
        view = View(
            now,
            len(up),
            self._target,
            loads,
            self._outstanding,
            len(self._held),
        )
        target, term = self._scaler.decide(view)
        self._scale(target, now)
        self._outcome.samples.append(
            Sample(
                now,
                rate * len(up),
                len(up),
                self._target,
                self._nodes,
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
                self._free_node(self._starting.pop(), now)
            else:
                self._leave(self._up.pop(), now)

    def _start(self, now: float) -> None:
        node_at = self._node_at(now)
        ready_at = max(now, node_at) + self._params.replica_start_s
        replica = _Replica(next(self._numbers), node_at, ready_at, self._scheduler())
        self._starting.append(replica)
        heapq.heappush(self._events, (replica.ready_at, next(self._order), -1, replica))

    def _node_at(self, now: float) -> float:
        """When the node of a replica that is started now is there: one that idles, for the shortest
        time so far, or boots for nobody, or a new one."""
        if not self._idle_nodes:
            self._nodes += 1
            return now + self._params.node_start_s
        there = bisect_right(self._idle_nodes, now)
        return self._idle_nodes.pop(max(0, there - 1))

    def _free_node(self, replica: _Replica, now: float) -> None:
        """A node that is still booting when its replica is given up comes nevertheless."""
        insort(self._idle_nodes, max(now, replica.node_at))

    def _ready(self, replica: _Replica, now: float) -> None:
        if replica not in self._starting:
            return  # given up before it was there
        self._starting.remove(replica)
        self._up.append(replica)
        if len(self._up) == 1:
            self._send_held(now)

    def _leave(self, replica: _Replica, now: float) -> None:
        if replica.by_number:
            self._leaving.add(replica)
        else:
            self._free_node(replica, now)

    def _fail(self, now: float) -> None:
        each = self._params.failures_per_hour * self._params.report_every_s / 3_600
        if not each:
            return
        for replica in [one for one in self._up if self._random() < each]:
            self._up.remove(replica)
            self._nodes -= 1
            self._outcome.lost_replicas += 1
            replica.turn += 1
            replica.batch = []
            for request in replica.by_number.values():
                request.again()
                self._send(request, now)

    def _pay(self, now: float) -> None:
        self._outcome.gpu_s += self._nodes * (now - self._paid_at)
        self._paid_at = now
