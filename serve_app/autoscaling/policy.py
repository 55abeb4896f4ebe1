"""How many replicas the work that waits needs. Pure arithmetic: standard library only, no clock.

A request costs what it would take alone on a replica, in seconds of *work*; requests differ a
hundredfold in it, so they are never counted. Ray Serve calls this through `ray_policy`, the
simulator by itself: both see the same function.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

Term = Literal["min", "blind", "held", "batch", "arrivals", "backlog", "max"]
"""What a decision came from: a bound, missing figures, a surplus not proven yet, work of the batch
class that needs one replica, work that arrives, work that waits."""


@dataclass(frozen=True)
class ReplicaLoad:
    """What one running replica says of itself."""

    backlog_s: float = 0.0
    """Predicted seconds until all that it has accepted is done."""
    arrival_rate: float = 0.0
    """Seconds of work that requests brought it, a second; refused ones included."""
    throughput: float = 1.0
    """Seconds of work that it does in a second in which it is busy: over 1 where batches gain."""
    mean_work_s: float = 0.0
    """Of a request; 0 before the first."""
    batch_backlog_s: float = 0.0
    """As ``backlog_s``, of the class that only fills idle time."""


@dataclass(frozen=True)
class Load:
    """What there is to do, and who does it, at one moment."""

    at_s: float
    """On any clock that only goes forward."""
    running: int
    """Replicas that can paint."""
    target: int
    """Replicas that were asked for: those that run and those that are starting."""
    replicas: Sequence[ReplicaLoad]
    """Of those that run, as far as their figures are known and fresh."""
    queued_requests: float = 0.0
    """At the gateways, not yet accepted by a replica."""


@dataclass(frozen=True)
class ScalingParams:
    """What an operator may choose."""

    min_replicas: int = 1
    max_replicas: int = 1
    target_utilization: float = 1.0
    """Share of the time in which replicas should be busy: what arrives, over this, is bought. What
    is kept for the noise of arrivals comes on top."""
    spare_replicas: int = 0
    """More than that: idle ones, paid for what comes faster than a replica starts."""
    target_drain_s: float = 180.0
    """Work that waits should be gone within this time, counted from when replicas that would be
    started now could help."""
    smoothing_s: float = 75.0
    """The arrival of work is averaged over about this time."""
    hold_s: float = 30.0
    """A surplus must have lasted this long, or a third of a cold start if that is longer, before
    replicas are given up."""
    cold_start_s: float = 60.0
    """From asking for a replica until it paints; assumed until it has been measured."""
    mean_work_s: float = 2.0
    """Of a request; assumed until one has been seen."""

    def __post_init__(self) -> None:
        for name in ("target_drain_s", "smoothing_s", "cold_start_s", "mean_work_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be over 0; it is {getattr(self, name)!r}")
        if not 0 < self.target_utilization <= 1:
            raise ValueError(
                f"target_utilization must be over 0 and at most 1; it is {self.target_utilization}"
            )
        if not 0 <= self.hold_s < math.inf:
            raise ValueError(f"hold_s must not be negative; it is {self.hold_s}")
        if self.spare_replicas < 0:
            raise ValueError(f"spare_replicas must not be negative; it is {self.spare_replicas}")
        if not 0 <= self.min_replicas <= self.max_replicas:
            raise ValueError(
                f"min_replicas is {self.min_replicas} and max_replicas {self.max_replicas}: there "
                "must be 0 <= min_replicas <= max_replicas"
            )


@dataclass(frozen=True)
class Start:
    """Replicas that were asked for together."""

    at_s: float
    """When."""
    to: int
    """They are all there when so many run."""


@dataclass(frozen=True)
class Memory:
    """What one decision hands to the next."""

    at_s: float | None = None
    """Of the last decision."""
    arrival_rate: float | None = None
    """Replicas that what arrives would keep busy, averaged over ``smoothing_s``."""
    slow_rate: float | None = None
    """The same, averaged over `_SLOWER` times as long: the difference tells the trend."""
    cold_start_s: float | None = None
    """Measured, smoothed."""
    mean_work_s: float = 0.0
    """Last seen; outlives the replicas, for a start from zero."""
    starts: tuple[Start, ...] = ()
    """Not all there yet, oldest first."""
    wanted: tuple[tuple[float, int], ...] = ()
    """(when it was last wanted, how many), as far back as a surplus must have lasted. The numbers
    fall: what was wanted before a larger number no longer matters."""


@dataclass(frozen=True)
class Decision:
    """How many replicas there should be, and why."""

    replicas: int
    term: Term
    """What ruled."""
    inputs: dict[str, float] = field(default_factory=dict)
    """The figures that it came from, by name."""

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value:.3g}" for name, value in self.inputs.items())
        return f"{self.replicas} replicas, by {self.term}: {figures}"


_WEIGHT = 0.3
"""Of a new measurement of the cold start against what was known."""

_SLOWER = 2.0

_MOST_OVERDUE = 4.0

_ROUNDING = 1e-6


def decide(load: Load, params: ScalingParams, memory: Memory) -> tuple[Decision, Memory]:
    """The number of replicas for this load, and what the next decision must know.

    Enough of them that what arrives keeps them busy for ``target_utilization`` of the time, and
    that what waits is done within ``target_drain_s`` from when new ones could help. Those that are
    starting count: one burst is answered once. A surplus is given up when nothing larger was wanted
    for ``hold_s`` or a third of a cold start: who gives up a replica that is wanted again pays that
    start with late requests. For the same reason one is no surplus that noise alone would want
    again, as long as the load does not plainly fall. The first replica is awaited even if nobody
    waits any more: clients were told to come when it is there.
    """
    memory = _observed(load, params, memory)
    cold_start_s = _cold_start(load, params, memory)
    rate = _forecast(params, memory, cold_start_s)
    waiting_s = _waiting(load, params, memory)
    by_arrivals = _for_arrivals(rate, params)
    by_backlog = _for_backlog(load, params, memory, rate, waiting_s, cold_start_s)
    wanted = max(by_arrivals, by_backlog)
    term: Term = "backlog" if by_backlog > by_arrivals else "arrivals"
    if wanted < 1 and any(one.batch_backlog_s > 0 for one in load.replicas):
        wanted, term = 1, "batch"
    if wanted < 1 and not load.running and load.target and _comes(load, params, memory):
        wanted, term = 1, "held"
    with_noise = min(load.target, _for_arrivals(rate, params, _noise(rate, params, memory)))
    if with_noise > wanted:
        wanted, term = with_noise, "held"

    recent = [entry for entry in memory.wanted if entry[1] > wanted]
    since_s = load.at_s - max(params.hold_s, cold_start_s / 3)
    recent = [entry for entry in recent if entry[0] >= since_s]
    memory = replace(memory, wanted=(*recent, (load.at_s, wanted)))
    replicas = wanted
    if wanted < load.target:
        held = min(load.target, memory.wanted[0][1])
        if held > replicas:
            replicas, term = held, "held"
        if len(load.replicas) < load.running:
            # What is not known may be busy.
            replicas, term = load.target, "blind"
    if replicas > params.max_replicas:
        replicas, term = params.max_replicas, "max"
    elif replicas < params.min_replicas:
        replicas, term = params.min_replicas, "min"
    if replicas > load.target:
        memory = replace(memory, starts=(*memory.starts, Start(load.at_s, replicas)))
    inputs = {
        "running": load.running,
        "target": load.target,
        "known": len(load.replicas),
        "arrivals": memory.arrival_rate or 0.0,
        "forecast": rate,
        "waiting_s": waiting_s,
        "by_arrivals": by_arrivals,
        "by_backlog": by_backlog,
        "cold_start_s": cold_start_s,
    }
    return Decision(replicas, term, inputs), memory


def _observed(load: Load, params: ScalingParams, memory: Memory) -> Memory:
    """Take in what this load says of arrivals, of requests, and of how long starts took."""
    rate, slow = memory.arrival_rate, memory.slow_rate
    if load.replicas:
        now = sum(one.arrival_rate / one.throughput for one in load.replicas)
        if rate is None or slow is None or memory.at_s is None:
            rate = slow = now
        # What comes to those that are not known is not there to see.
        elif now > rate or len(load.replicas) >= load.running:
            passed_s = max(0.0, load.at_s - memory.at_s)
            rate += (now - rate) * -math.expm1(-passed_s / params.smoothing_s)
            slow += (now - slow) * -math.expm1(-passed_s / (_SLOWER * params.smoothing_s))
    elif not load.running:
        rate = slow = None  # nobody is there to tell
    means = [one.mean_work_s for one in load.replicas if one.mean_work_s > 0]
    cold_start_s, starts = memory.cold_start_s, list(memory.starts)
    while starts and load.running >= starts[0].to:
        took_s = load.at_s - starts.pop(0).at_s
        known = took_s if cold_start_s is None else cold_start_s
        cold_start_s = known + _WEIGHT * (took_s - known)
    # Whoever has only just begun to look takes what is there for wanted.
    wanted = ((load.at_s, load.target),) if memory.at_s is None else memory.wanted
    return Memory(
        at_s=load.at_s,
        arrival_rate=rate,
        slow_rate=slow,
        cold_start_s=cold_start_s,
        mean_work_s=sum(means) / len(means) if means else memory.mean_work_s,
        # What was given up before it was there is no longer awaited.
        starts=tuple(
            replace(start, to=min(start.to, load.target))
            for number, start in enumerate(starts)
            if load.running < load.target and (number == 0 or starts[number - 1].to < load.target)
        ),
        wanted=wanted,
    )


def _cold_start(load: Load, params: ScalingParams, memory: Memory) -> float:
    """As measured, or assumed; more while a start takes longer than that."""
    known_s = _known_start(params, memory)
    # One that never comes, for want of a GPU, shall not stop the rest of the arithmetic.
    return max(known_s, min(_oldest_start_s(load, memory), _MOST_OVERDUE * known_s))


def _comes(load: Load, params: ScalingParams, memory: Memory) -> bool:
    """Whether a start is under way that may still end well."""
    longest_s = _MOST_OVERDUE * _known_start(params, memory)
    return bool(memory.starts) and _oldest_start_s(load, memory) < longest_s


def _known_start(params: ScalingParams, memory: Memory) -> float:
    return memory.cold_start_s or params.cold_start_s


def _oldest_start_s(load: Load, memory: Memory) -> float:
    """How long the oldest start that is not over has taken; 0 if none is under way."""
    return load.at_s - memory.starts[0].at_s if memory.starts else 0.0


def _forecast(params: ScalingParams, memory: Memory, cold_start_s: float) -> float:
    """What will arrive when a replica that is asked for now is there, in replicas kept busy.

    An average over a time lags behind a steady rise by that time, so two of them tell its slope:
    double exponential smoothing (Brown, 1959, "Statistical forecasting for inventory control"). No
    rise goes on for ever, and what it adds after the present is damped (Gardner and McKenzie, 1985,
    "Forecasting trends in time series"): half of it is expected.
    """
    if memory.arrival_rate is None or memory.slow_rate is None:
        return 0.0
    rate = memory.arrival_rate
    slope = (rate - memory.slow_rate) / ((_SLOWER - 1) * params.smoothing_s)
    return max(0.0, rate + slope * (params.smoothing_s + cold_start_s / 2))


def _for_arrivals(rate: float, params: ScalingParams, noise: float = 0.0) -> int:
    if rate <= _ROUNDING:
        return 0
    replicas = math.ceil(rate / params.target_utilization + noise - _ROUNDING)
    return replicas + params.spare_replicas


def _noise(rate: float, params: ScalingParams, memory: Memory) -> float:
    """By how much a rate that is steady seems to vary: twice the standard deviation of its average
    over ``smoothing_s``, if requests of the mean work come as a Poisson process. Nothing when it
    has fallen by more than one below the slower average: then it is not steady."""
    work_s = memory.mean_work_s or params.mean_work_s
    deviation = math.sqrt(rate * work_s / params.smoothing_s)
    fallen = (memory.slow_rate or 0.0) - (memory.arrival_rate or 0.0)
    return 0.0 if fallen > deviation else 2 * deviation


def _waiting(load: Load, params: ScalingParams, memory: Memory) -> float:
    """What waits, in seconds of one replica."""
    known = load.replicas
    throughput = sum(one.throughput for one in known) / len(known) if known else 1.0
    queued_s = load.queued_requests * (memory.mean_work_s or params.mean_work_s) / throughput
    return sum(one.backlog_s for one in known) + queued_s


def _for_backlog(
    load: Load,
    params: ScalingParams,
    memory: Memory,
    rate: float,
    waiting_s: float,
    cold_start_s: float,
) -> int:
    """As many as have it done in time, with those that are there or starting."""
    horizon_s = cold_start_s + params.target_drain_s
    supply_s = load.running * horizon_s
    there = load.running
    for start in memory.starts:
        coming = max(0, min(start.to, load.target) - there)
        there += coming
        awaited_s = min(max(0.0, start.at_s + cold_start_s - load.at_s), cold_start_s)
        supply_s += coming * (horizon_s - awaited_s)
    # Others asked for them: nobody knows when.
    supply_s += max(0, load.target - there) * params.target_drain_s
    missing_s = waiting_s + rate * horizon_s - supply_s
    if missing_s > _ROUNDING:
        return load.target + math.ceil(missing_s / params.target_drain_s - _ROUNDING)
    return min(load.target, math.ceil(waiting_s / params.target_drain_s + rate - _ROUNDING))
