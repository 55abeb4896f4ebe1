"""Decides how many replicas the waiting and arriving work needs. Standard library only, no clock.

The unit of work is the solo second: one second of a request alone on an idle replica. Requests
differ a hundredfold in work, so the policy never counts requests. Ray Serve calls `decide` through
`ray_policy`; the simulator calls the same function directly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from serve_app.protocol.cold_start import ASSUMED_COLD_START_S, smoothed_cold_start
from serve_app.protocol.load import ReplicaLoad

Term = Literal["min", "blind", "hold", "batch", "arrivals", "backlog", "max"]
"""The reason for a decision: a bound, missing metrics, a surplus not proven yet, low-priority work
that needs one replica, arriving work, or waiting work. The values are metric labels."""


@dataclass(frozen=True)
class Load:
    """The work and the replicas of one deployment at one moment."""

    at_s: float
    """Time on any clock that never goes backwards."""
    running: int
    """Replicas that can generate."""
    target: int
    """Requested replicas: the running and the starting ones."""
    reports: Sequence[ReplicaLoad]
    """Loads of the running replicas whose reports are complete and fresh."""
    queued_requests: float = 0.0
    """Requests at the gateways that no replica has accepted yet."""


@dataclass(frozen=True)
class ScalingParams:
    """The scaling parameters of an operator."""

    min_replicas: int = 1
    """Least number of replicas; from ``autoscaling_config``."""
    max_replicas: int = 1
    """Greatest number of replicas; from ``autoscaling_config``."""
    target_utilization: float = 1.0
    """Share of the time that replicas should be busy, over 0 and at most 1.

    Arriving work divided by this share gives the number of replicas. The reserve for random
    variation of arrivals is added to it."""
    spare_replicas: int = 0
    """Additional replicas, at least 0, for load that rises faster than a replica starts."""
    target_drain_s: float = 180.0
    """Time in seconds, over 0, within which waiting work should be done. It counts from the moment
    at which a replica that is requested now would be ready."""
    smoothing_s: float = 75.0
    """Averaging time of the arrival rate, in seconds, over 0."""
    hold_s: float = 30.0
    """Time in seconds, at least 0, that a surplus must last before replicas are removed. A third of
    a cold start applies if it is longer."""
    cold_start_s: float = ASSUMED_COLD_START_S
    """Time from the request for a replica until it can generate, in seconds, over 0. Assumed until
    a start is measured."""
    mean_work_s: float = 2.0
    """Mean work of a request, in solo seconds, over 0. Assumed until a request has arrived."""

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
    """A group of replicas requested together."""

    at_s: float
    """Time of the request."""
    ready_at: int
    """Number of running replicas at which the whole group is ready."""


@dataclass(frozen=True)
class PolicyState:
    """State that one decision passes to the next."""

    at_s: float | None = None
    """Time of the last decision."""
    arriving: float | None = None
    """Replicas that the arriving work keeps busy, averaged over ``smoothing_s``."""
    arriving_slow: float | None = None
    """The same, averaged over `_SLOWER` times as long: the difference gives the trend."""
    cold_start_s: float | None = None
    """Measured time of a start, smoothed; None before the first one."""
    mean_work_s: float = 0.0
    """Last known mean work of a request. It outlives the replicas, for a start from zero."""
    starts: tuple[Start, ...] = ()
    """Starts that are not complete yet, oldest first."""
    recent_needs: tuple[tuple[float, int], ...] = ()
    """(time, replicas needed), as far back as a surplus must last. The numbers decrease: an earlier
    need below a later one no longer matters."""


@dataclass(frozen=True)
class Decision:
    """The number of replicas, and the reason."""

    replicas: int
    term: Term
    """The decisive term."""
    inputs: dict[str, float] = field(default_factory=dict)
    """The values behind the decision, by name."""

    def __str__(self) -> str:
        values = ", ".join(f"{name} {value:.3g}" for name, value in self.inputs.items())
        return f"{self.replicas} replicas, by {self.term}: {values}"


_SLOWER = 2.0
"""Ratio of the slow averaging time to the fast one."""

_MOST_OVERDUE = 4.0
"""Multiple of a known cold start beyond which a start is expected to fail."""

_ROUNDING = 1e-6


def decide(load: Load, params: ScalingParams, state: PolicyState) -> tuple[Decision, PolicyState]:
    """Return the number of replicas for this load, and the state for the next decision.

    Arriving work keeps the replicas busy for ``target_utilization`` of the time. Waiting work is
    done within ``target_drain_s``, counted from when new replicas could help. Starting replicas
    count, so that one burst is answered once.

    A surplus is removed when nothing larger was needed for ``hold_s``, or for a third of a cold
    start if that is longer: a replica that is removed too early costs another cold start, and late
    requests. For the same reason, a replica that noise alone would request again is no surplus,
    unless the load clearly falls. Idle replicas are a surplus, whatever arrived before: another
    model may wait for the GPU. The start of a first replica is not cancelled when no request waits
    any more: clients return when it is ready.
    """
    state = _observed(load, params, state)
    cold_start_s = _cold_start(load, params, state)
    rate = 0.0 if _is_idle(load) else _forecast(params, state, cold_start_s)
    waiting_s = _waiting(load, params, state)
    by_arrivals = _for_arrivals(rate, params)
    by_backlog = _for_backlog(load, params, state, rate, waiting_s, cold_start_s)
    needed = _needed(load, params, state, by_arrivals, by_backlog)
    needed = _with_noise(load, params, state, rate, needed)
    state = _remembered(load, state, needed.replicas, max(params.hold_s, cold_start_s / 3))
    kept = _with_surplus(load, state, needed)
    replicas, term = _bounded(params, kept)
    if replicas > load.target:
        state = replace(state, starts=(*state.starts, Start(load.at_s, replicas)))
    inputs = {
        "running": load.running,
        "target": load.target,
        "known": len(load.reports),
        "arrivals": state.arriving or 0.0,
        "forecast": rate,
        "waiting_s": waiting_s,
        "by_arrivals": by_arrivals,
        "by_backlog": by_backlog,
        "cold_start_s": cold_start_s,
    }
    return Decision(replicas, term, inputs), state


# ---- from what is needed to the decision ---------------------------------------------------------


class _Choice(NamedTuple):
    replicas: int
    term: Term


def _needed(
    load: Load, params: ScalingParams, state: PolicyState, by_arrivals: int, by_backlog: int
) -> _Choice:
    """Return the replicas that the work needs now."""
    if by_backlog > by_arrivals:
        return _Choice(by_backlog, "backlog")
    if by_arrivals >= 1:
        return _Choice(by_arrivals, "arrivals")
    if any(report.batch_backlog_s > 0 for report in load.reports):
        return _Choice(1, "batch")
    if not load.running and load.target and _start_may_succeed(load, params, state):
        return _Choice(1, "hold")  # the first replica: clients return when it is ready
    return _Choice(0, "arrivals")


def _with_noise(
    load: Load, params: ScalingParams, state: PolicyState, rate: float, needed: _Choice
) -> _Choice:
    """Keep replicas that noise in the arrivals alone would request again."""
    with_noise = _for_arrivals(rate, params, _noise(rate, params, state))
    kept = min(load.target, with_noise)
    return _Choice(kept, "hold") if kept > needed.replicas else needed


def _remembered(load: Load, state: PolicyState, needed: int, hold_s: float) -> PolicyState:
    """Add the present need to the recent ones, and forget those that no longer matter."""
    recent = [
        (at_s, count)
        for at_s, count in state.recent_needs
        if count > needed and at_s >= load.at_s - hold_s
    ]
    return replace(state, recent_needs=(*recent, (load.at_s, needed)))


def _with_surplus(load: Load, state: PolicyState, needed: _Choice) -> _Choice:
    """Keep a surplus that was needed recently, and all replicas while one of them is silent."""
    if needed.replicas >= load.target:
        return needed
    if len(load.reports) < load.running:
        return _Choice(load.target, "blind")  # a replica without a report may be busy
    kept = min(load.target, state.recent_needs[0][1])
    return _Choice(kept, "hold") if kept > needed.replicas else needed


def _bounded(params: ScalingParams, choice: _Choice) -> _Choice:
    if choice.replicas > params.max_replicas:
        return _Choice(params.max_replicas, "max")
    if choice.replicas < params.min_replicas:
        return _Choice(params.min_replicas, "min")
    return choice


# ---- averages and estimates ----------------------------------------------------------------------


def _observed(load: Load, params: ScalingParams, state: PolicyState) -> PolicyState:
    """Update the averages of arrivals, of work per request and of cold starts."""
    rate, slow = state.arriving, state.arriving_slow
    if load.reports:
        now = sum(one.arrival_rate / one.throughput for one in load.reports)
        if rate is None or slow is None or state.at_s is None:
            rate = slow = now
        # The sum lacks arrivals at replicas without a report: it may only raise the rate.
        elif now > rate or len(load.reports) >= load.running:
            passed_s = max(0.0, load.at_s - state.at_s)
            rate += (now - rate) * -math.expm1(-passed_s / params.smoothing_s)
            slow += (now - slow) * -math.expm1(-passed_s / (_SLOWER * params.smoothing_s))
    elif not load.running:
        rate = slow = None  # no replica measures arrivals
    means = [one.mean_work_s for one in load.reports if one.mean_work_s > 0]
    cold_start_s, starts = state.cold_start_s, list(state.starts)
    while starts and load.running >= starts[0].ready_at:
        cold_start_s = smoothed_cold_start(cold_start_s, load.at_s - starts.pop(0).at_s)
    # The first decision takes the present target as needed.
    first = ((load.at_s, load.target),)
    recent_needs = first if state.at_s is None else state.recent_needs
    return PolicyState(
        at_s=load.at_s,
        arriving=rate,
        arriving_slow=slow,
        cold_start_s=cold_start_s,
        mean_work_s=sum(means) / len(means) if means else state.mean_work_s,
        # A start that was cancelled before it was ready is no longer expected.
        starts=tuple(
            replace(start, ready_at=min(start.ready_at, load.target))
            for number, start in enumerate(starts)
            if load.running < load.target
            and (number == 0 or starts[number - 1].ready_at < load.target)
        ),
        recent_needs=recent_needs,
    )


def _cold_start(load: Load, params: ScalingParams, state: PolicyState) -> float:
    """Return the measured or assumed cold start, or the age of an overdue one if that is longer."""
    known_s = _known_start(params, state)
    # The bound keeps a start that never ends, for want of a GPU, from disabling the policy.
    return max(known_s, min(_oldest_start_s(load, state), _MOST_OVERDUE * known_s))


def _start_may_succeed(load: Load, params: ScalingParams, state: PolicyState) -> bool:
    """Tell if a start is in progress and not overdue beyond recovery."""
    longest_s = _MOST_OVERDUE * _known_start(params, state)
    return bool(state.starts) and _oldest_start_s(load, state) < longest_s


def _known_start(params: ScalingParams, state: PolicyState) -> float:
    return state.cold_start_s or params.cold_start_s


def _oldest_start_s(load: Load, state: PolicyState) -> float:
    """Return the age of the oldest start in progress; 0 without one."""
    return load.at_s - state.starts[0].at_s if state.starts else 0.0


def _is_idle(load: Load) -> bool:
    """Tell if no replica has work, and none was offered any in the window of its report.

    The average of earlier arrivals would keep the last replica, and its GPU, for minutes.
    """
    return len(load.reports) >= load.running and not any(
        report.arrival_rate or report.backlog_s for report in load.reports
    )


def _forecast(params: ScalingParams, state: PolicyState, cold_start_s: float) -> float:
    """Predict the arriving work when a replica requested now is ready, in busy replicas.

    An average over a time lags behind a steady rise by that time, so that two averages give its
    slope: double exponential smoothing (Brown, 1959, "Statistical forecasting for inventory
    control"). No rise lasts for ever, so that its future part is damped (Gardner and McKenzie,
    1985, "Forecasting trends in time series"): the forecast adds half of it.
    """
    if state.arriving is None or state.arriving_slow is None:
        return 0.0
    rate = state.arriving
    slope = (rate - state.arriving_slow) / ((_SLOWER - 1) * params.smoothing_s)
    return max(0.0, rate + slope * (params.smoothing_s + cold_start_s / 2))


def _for_arrivals(rate: float, params: ScalingParams, noise: float = 0.0) -> int:
    """Return the replicas that arriving work needs, with the spare ones."""
    if rate <= _ROUNDING:
        return 0
    replicas = math.ceil(rate / params.target_utilization + noise - _ROUNDING)
    return replicas + params.spare_replicas


def _noise(rate: float, params: ScalingParams, state: PolicyState) -> float:
    """Return the noise in the average of a steady rate, in busy replicas.

    Two standard deviations of the average over ``smoothing_s``, for a Poisson process of requests
    of the mean work. 0 when the rate is more than one deviation below the slower average: then it
    is not steady.
    """
    work_s = state.mean_work_s or params.mean_work_s
    deviation = math.sqrt(rate * work_s / params.smoothing_s)
    fallen = (state.arriving_slow or 0.0) - (state.arriving or 0.0)
    return 0.0 if fallen > deviation else 2 * deviation


def _waiting(load: Load, params: ScalingParams, state: PolicyState) -> float:
    """Return the waiting work, in seconds of one replica."""
    reports = load.reports
    throughput = sum(one.throughput for one in reports) / len(reports) if reports else 1.0
    queued_s = load.queued_requests * (state.mean_work_s or params.mean_work_s) / throughput
    return sum(one.backlog_s for one in reports) + queued_s


def _for_backlog(
    load: Load,
    params: ScalingParams,
    state: PolicyState,
    rate: float,
    waiting_s: float,
    cold_start_s: float,
) -> int:
    """Return the replicas that finish the waiting work in time, starting ones included."""
    horizon_s = cold_start_s + params.target_drain_s
    supply_s = load.running * horizon_s
    there = load.running
    for start in state.starts:
        coming = max(0, min(start.ready_at, load.target) - there)
        there += coming
        awaited_s = min(max(0.0, start.at_s + cold_start_s - load.at_s), cold_start_s)
        supply_s += coming * (horizon_s - awaited_s)
    # Something else requested these: the time of their start is unknown.
    supply_s += max(0, load.target - there) * params.target_drain_s
    missing_s = waiting_s + rate * horizon_s - supply_s
    if missing_s > _ROUNDING:
        return load.target + math.ceil(missing_s / params.target_drain_s - _ROUNDING)
    return min(load.target, math.ceil(waiting_s / params.target_drain_s + rate - _ROUNDING))
