"""Who is taken in, and who is told to come again later. Pure Python: from predicted seconds.

Nobody joins a backlog of more than `EngineConfig.max_backlog_s`; and who names a deadline must make
it, and make nobody miss one who named it before. Who was refused and comes again when told to, as
`Standing` says, has our word: the backlog may be twice as long, so that those who come for the
first time cannot take the place that was promised, and if the time was misjudged, it is late.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from serve_app.engine.params import Standing

RESERVE = 2.0
"""How many times as much work may wait before who comes again when told to."""

Reason = Literal["deadline", "backlog"]


@dataclass(frozen=True)
class Wish:
    """When a request is predicted to be done, and when it must be."""

    finish_s: float
    """From now, in the company that it has."""
    left_s: float
    """From now to its deadline."""

    @property
    def late_s(self) -> float:
        return self.finish_s - self.left_s


@dataclass(frozen=True)
class Refusal:
    """Why a request is not taken in."""

    reason: Reason
    excess_s: float
    """When so much of the work that is here is done, it could be, if nobody else comes."""


@dataclass(frozen=True)
class Deadline:
    """What a request names, and how it stands to that."""

    deadline_s: float
    """From when it was sent."""
    alone_s: float
    """What it takes on an idle engine."""
    wish: Wish


def hopeless(alone_s: float, left_s: float) -> bool:
    """Whether a request would be late by far if nobody else were here.

    Devices have slow moments: by a little is no reason to refuse what nothing else is done for.
    """
    return alone_s > 2 * left_s


def judge(
    joined_s: float,
    limit_s: float,
    standing: Standing,
    own: Deadline | None = None,
    delayed: Sequence[Wish] = (),
) -> Refusal | None:
    """Whether to take a request in: ``None``, or why not.

    Args:
        joined_s: Predicted seconds of the work that is here, without what came with the request.
        limit_s: The most of it that the request may join.
        standing: How it comes.
        own: Its deadline, if it names one.
        delayed: Others with a deadline, which it goes before.

    An idle engine refuses only who has waited for it so long that he would be late by far.
    """
    if not joined_s:
        too_late = own is not None and hopeless(own.alone_s, own.wish.left_s)
        return Refusal("deadline", 0.0) if too_late else None
    width = RESERVE if standing.returning else 1.0
    excess_s = max(0.0, joined_s - limit_s)
    late_s = 0.0
    if own is not None and not standing.returning:
        delay_s = max((one.late_s for one in delayed), default=0.0)
        late_s = max(own.wish.late_s + standing.promised_s, delay_s)
        excess_s = max(excess_s, own.wish.finish_s - own.deadline_s, delay_s)
    if joined_s + standing.promised_s > width * limit_s:
        return Refusal("backlog", excess_s)
    return Refusal("deadline", excess_s) if late_s > 0 else None
