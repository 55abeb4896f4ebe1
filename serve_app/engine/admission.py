"""Admission: whether a request may join the queue, or is rejected with a time to retry. Torch-free.

Three rules decide:

1. No request joins a backlog of more than `EngineConfig.max_backlog_s`.
2. A request with a deadline must meet it, together with its siblings (the requests of the same
   HTTP request), and must not make an earlier request miss a deadline that its client named.
3. A retry that redeems a reservation was given its time before. The backlog may then be twice as
   long, so that first attempts cannot take the reserved room. If that time was wrong, it is late
   rather than rejected again.
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from serve_app.config.models import EngineConfig
from serve_app.engine.metrics import EngineMetrics, RejectionReason
from serve_app.engine.predictor import Predictor
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.scheduling.load import LoadTracker
from serve_app.errors import InvalidRequest, Overloaded
from serve_app.protocol.events import Progress, Queued
from serve_app.protocol.params import RequestContext

if TYPE_CHECKING:  # a request holds tensors
    from serve_app.engine.request import Request

RESERVE = 2.0
"""Multiple of the backlog limit up to which a retry is admitted."""

Cause = Literal["backlog", "late", "reserved", "siblings", "delay"]
"""Cause of a rejection: the backlog is full; the request would miss its own deadline because of the
backlog, of work reserved for retries, or of its siblings; or it would make another one miss its."""


@dataclass(frozen=True)
class DeadlineEstimate:
    """Predicted completion of a request, and its deadline."""

    finish_s: float
    """Seconds from now to its completion, behind the requests that run before it."""
    left_s: float
    """Seconds from now to its deadline."""

    @property
    def late_s(self) -> float:
        return self.finish_s - self.left_s


@dataclass(frozen=True)
class Deadline:
    """The deadline that a client named, and what it means here."""

    deadline_s: float
    """Seconds from the sending of the request."""
    solo_s: float
    """Seconds of the request on an idle engine."""
    estimate: DeadlineEstimate


@dataclass(frozen=True)
class Rejection:
    """Why a request is not admitted."""

    cause: Cause
    excess_s: float
    """Seconds of the present work after which it could be admitted, if no other request comes."""

    @property
    def reason(self) -> RejectionReason:
        return "backlog" if self.cause == "backlog" else "deadline"


def infeasible(solo_s: float, left_s: float) -> bool:
    """Return whether a request would be far too late even on an idle engine.

    Devices have slow moments, so being a little late is no reason to reject.
    """
    return solo_s > 2 * left_s


def decide_admission(
    queued_work_s: float,
    limit_s: float,
    context: RequestContext,
    own: Deadline | None = None,
    delayed: Sequence[DeadlineEstimate] = (),
    has_siblings: bool = False,
) -> Rejection | None:
    """Return ``None`` to admit the request, or why it is rejected.

    An idle engine rejects only two kinds: a request that waited on its way until it would be far
    too late, and one that cannot meet its deadline together with its siblings.

    Args:
        queued_work_s: Predicted seconds of the queued work, without the request's siblings.
        limit_s: The most of it that the request may join.
        context: The request's circumstances: a retry or not, and the work reserved for others.
        own: The request's deadline, if its client named one.
        delayed: Other requests with a deadline that it would go before, its siblings among them.
        has_siblings: Whether siblings of the request are here.
    """
    idle = not queued_work_s
    if idle and own is not None and infeasible(own.solo_s, own.estimate.left_s):
        return Rejection("late", 0.0)
    if idle and not (has_siblings and own is not None):
        return None
    width = RESERVE if context.is_retry else 1.0
    reserved_s = 0.0 if idle else context.reserved_s
    excess_s = max(0.0, queued_work_s - limit_s)
    cause: Cause | None = None
    if own is not None and not context.is_retry:
        delay_s = max((one.late_s for one in delayed), default=0.0)
        excess_s = max(excess_s, own.estimate.finish_s - own.deadline_s, delay_s)
        missed_s = max(own.estimate.late_s, delay_s) if idle else own.estimate.late_s
        if missed_s > 0:
            cause = "siblings" if has_siblings and missed_s > queued_work_s else "late"
        elif own.estimate.late_s + reserved_s > 0:
            cause = "reserved"
        elif delay_s > 0:
            cause = "delay"
    if queued_work_s + reserved_s > width * limit_s:
        cause = "backlog"
    return None if cause is None else Rejection(cause, excess_s)


class AdmissionControl:
    """Admits requests to the scheduler, or rejects them. Used by the engine's thread only."""

    def __init__(
        self,
        config: EngineConfig,
        scheduler: Scheduler,
        predictor: Predictor,
        load_tracker: LoadTracker,
        metrics: EngineMetrics,
    ) -> None:
        self._config = config
        self._scheduler = scheduler
        self._predictor = predictor
        self._load_tracker = load_tracker
        self._metrics = metrics

    def admit(self, request: "Request") -> Queued:
        """Add the request to the waiting ones, and return its position.

        Raises:
            InvalidRequest: if it would be far too late even on an idle engine.
            Overloaded: if it is rejected, with the time after which to retry.
        """
        entry, deadline_s = request.entry, request.params.deadline_s
        solo_s = entry.remaining_s = self._predictor.remaining_s(request)
        if deadline_s is not None and infeasible(solo_s, deadline_s):
            # Not counted as offered load: it would be late on any number of replicas.
            self._metrics.rejected("deadline")
            raise _infeasible(solo_s, deadline_s)
        if not (entry.low_priority or request.context.is_retry):
            self._load_tracker.offered(time.perf_counter(), solo_s)
        due_s = deadline_s or self._config.slo_scale * solo_s
        entry.named = deadline_s is not None
        entry.deadline_at = request.submitted_at - request.waited_s + due_s
        already_late = {other for other in self._scheduler.requests if other.entry.late}
        self._scheduler.add(request)
        try:
            position = self._position(request, solo_s, already_late)
        except BaseException:
            self._scheduler.withdraw(request)
            raise
        self._scheduler.enqueue(request)
        self._load_tracker.accepted(request.accepted_at, solo_s, entry.low_priority)
        return position

    def _position(
        self, request: "Request", solo_s: float, already_late: Collection["Request"]
    ) -> Queued:
        """Return the position of a request among the others, or raise `Overloaded`."""
        now = request.accepted_at = time.perf_counter()
        order = self._scheduler.order(request, now)
        completion_s = self._predictor.completion_s(order)
        index = order.index(request)
        own, *later = (
            DeadlineEstimate(finish_s, other.entry.deadline_at - now)
            for other, finish_s in zip(order[index:], completion_s[index:], strict=True)
            if other is request
            or (other.params.deadline_s is not None and other not in already_late)
        )
        siblings = {one for one in self._scheduler.requests if _are_siblings(request, one)}
        queued_work_s = self._queued_work_s(request, siblings)
        rejection = self._decide(request, queued_work_s, solo_s, own, later, bool(siblings))
        if rejection is not None:
            self._metrics.rejected(rejection.reason)
            work_s = solo_s / self._load_tracker.throughput()
            raise _overloaded(request, rejection, queued_work_s, work_s)
        request.predicted_s = completion_s[index]
        return Queued(_waiting_before(order, index), request.predicted_s)

    def locate(self, request: "Request") -> Queued | Progress:
        """Return how far a request is, and the seconds until it should complete."""
        order = self._scheduler.order(request, time.perf_counter())
        eta_s = self._predictor.completion_of_s(request, order)
        if request.job is None:
            return Queued(_waiting_before(order, order.index(request)), eta_s)
        return Progress(request.steps_done, request.steps_done + request.steps_left, eta_s)

    def _queued_work_s(self, request: "Request", siblings: Collection["Request"]) -> float:
        """Return the seconds of queued work that the request meets, without its siblings."""
        queued_work_s = sum(
            other.entry.remaining_s
            for other in self._scheduler.requests
            if other.entry.low_priority <= request.entry.low_priority
            and other is not request
            and other not in siblings
        )
        return queued_work_s / self._load_tracker.throughput()

    def _decide(
        self,
        request: "Request",
        queued_work_s: float,
        solo_s: float,
        own: DeadlineEstimate,
        delayed: Sequence[DeadlineEstimate],
        has_siblings: bool,
    ) -> Rejection | None:
        context, deadline_s = request.context, request.params.deadline_s
        if request.entry.low_priority:
            # The gateway gives up a request after max_deadline_s. Retries may use all of it, first
            # attempts half.
            limit_s = self._config.limits.max_deadline_s / RESERVE
            return decide_admission(queued_work_s, limit_s, context)
        deadline = None if deadline_s is None else Deadline(deadline_s, solo_s, own)
        limit_s = self._config.max_backlog_s
        return decide_admission(queued_work_s, limit_s, context, deadline, delayed, has_siblings)


def _are_siblings(request: "Request", other: "Request") -> bool:
    order = request.context.order
    return other is not request and bool(order) and other.context.order == order


def _waiting_before(order: Sequence["Request"], index: int) -> int:
    return sum(other.job is None for other in order[:index])


def _infeasible(solo_s: float, deadline_s: float) -> InvalidRequest:
    return InvalidRequest(
        f"deadline_s is {deadline_s:g}, and this image takes about {solo_s:.2g} s on an idle "
        "replica. Allow more time, or request a smaller image or fewer steps.",
        "deadline_s",
    )


def _overloaded(
    request: "Request", rejection: Rejection, queued_work_s: float, work_s: float
) -> Overloaded:
    deadline_s, reserved_s = request.params.deadline_s, request.context.reserved_s
    queued = f"about {queued_work_s:.1f} s of work are queued"
    if reserved_s and rejection.cause in ("backlog", "reserved"):
        queued += f", and {reserved_s:.1f} s are reserved for retries of other requests"
    match rejection.cause:
        case "backlog":
            why = f"{queued}; the queue is full."
        case "late" | "reserved":
            why = f"{queued}; the image cannot be done within deadline_s ({deadline_s:g} s)."
        case "siblings":
            why = (
                f"the images of this request cannot all be done within deadline_s "
                f"({deadline_s:g} s); request fewer images, or allow more time."
            )
        case "delay":
            why = f"{queued}; this image would make another request miss its deadline."
    return Overloaded(
        why,
        "deadline_s" if rejection.reason == "deadline" else None,
        retry_after_s=max(1.0, rejection.excess_s),
        work_s=work_s,
    )
