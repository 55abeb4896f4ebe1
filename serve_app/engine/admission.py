"""Who is taken in, and who is told to come again later. Pure Python: from predicted seconds.

Nobody joins a backlog of more than `EngineConfig.max_backlog_s`; and who names a deadline must make
it, together with what came with it, and make nobody miss one who named it before. Who was refused
and comes again when told to, as `RequestContext` says, has our word: the backlog may be twice as
long, so that those who come for the first time cannot take the place that was reserved, and if
the time was misjudged, it is late.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from serve_app.protocol.params import RequestContext

RESERVE = 2.0
"""How many times as much work may wait before who comes again when told to."""

Reason = Literal["deadline", "backlog"]

Cause = Literal["backlog", "late", "reserved", "siblings", "delay"]
"""More is not taken in; or it would itself miss its deadline: for what is here, only with what was
promised to others, or for those that came with it; or it would make another miss its own."""


@dataclass(frozen=True)
class DeadlineEstimate:
    """When a request is predicted to be done, and when it must be."""

    finish_s: float
    """From now, in the company that it has."""
    left_s: float
    """From now to its deadline."""

    @property
    def late_s(self) -> float:
        return self.finish_s - self.left_s


@dataclass(frozen=True)
class Rejection:
    """Why a request is not taken in."""

    cause: Cause
    excess_s: float
    """When so much of the work that is here is done, it could be, if nobody else comes."""

    @property
    def reason(self) -> Reason:
        return "backlog" if self.cause == "backlog" else "deadline"


@dataclass(frozen=True)
class Deadline:
    """What a request names, and how it stands to that."""

    deadline_s: float
    """From when it was sent."""
    solo_s: float
    """What it takes on an idle engine."""
    estimate: DeadlineEstimate


def infeasible(solo_s: float, left_s: float) -> bool:
    """Whether a request would be late by far if nobody else were here.

    Devices have slow moments: by a little is no reason to refuse what nothing else is done for.
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
    """Whether to take a request in: ``None``, or why not.

    Args:
        joined_s: Predicted seconds of the work that is here, without what came with the request.
        limit_s: The most of it that the request may join.
        standing: How it comes.
        own: Its deadline, if it names one.
        delayed: Others with a deadline, which it goes before, those that came with it among them.
        in_company: Whether others are here that came with it.

    An idle engine refuses only who has waited for it so long that he would be late by far, and who
    comes in a company that cannot be done in time together.
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
