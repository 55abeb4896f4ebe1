"""Who was told to come again, and when: what makes a ``Retry-After`` a promise.

A queue in which nobody stands. Whoever is refused is told the time at which there is room for him,
after all who were told before; when he comes then, he is known by what he asks for, and the engine
keeps a reserve for him that those who come for the first time do not get. No work is held back for
it: an engine that is idle takes in whoever comes.

Each gateway replica keeps its own: with several, one knows nothing of what another promised. The
engine's reserve makes up for that as far as it goes.
"""

import hashlib
import math
import time
from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from serve_app.errors import Overloaded

PACE = 0.9
"""Share of the time that is promised; the rest is for what was not foreseen."""

MOST = 10_000
"""Promises at a time. Beyond them one is told when to come, and is not known then."""

PATIENCE_S, PATIENCE_SHARE = 5.0, 0.25
"""A place is kept so long after its time, the second as a share of the wait: clients round."""

_WEIGHT = 0.02
"""Of one promise, in the share of those who come when told to."""

_LEAST_SHARE = 0.05


def fingerprint(parts: Iterable[bytes]) -> bytes:
    """By which a request is known when it comes again."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return digest.digest()


@dataclass(frozen=True, order=True)
class _Place:
    due_at: float
    given_up_at: float
    work_s: float
    fingerprint: bytes


class Promises:
    """Those of one gateway replica, to requests of one class."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._in_turn: list[_Place] = []
        self._by_fingerprint: dict[bytes, list[_Place]] = {}
        self._free_at = 0.0
        """When all that was promised will be done."""
        self._share = 1.0

    def claim(self, fingerprint: bytes) -> bool:
        """Whether such a request was told to come by now; the place is his."""
        self._forget()
        places = self._by_fingerprint.get(fingerprint)
        if not places or places[0].due_at > self._clock():
            return False
        self._leave(places[0])
        self._count(1.0)
        return True

    def due_within_s(self, seconds: float) -> float:
        """Seconds of work of those who were told to come in the next so many."""
        self._forget()
        until = self._clock() + seconds
        work_s = 0.0
        for place in self._in_turn:
            if place.due_at > until:
                break
            work_s += place.work_s
        return work_s * self._share

    def promise(self, fingerprint: bytes, refusal: Overloaded, returning: bool) -> Overloaded:
        """The refusal with the time to come again, which is noted.

        ``returning``: who came as told and found no room. He need not stand in line again; those
        who are told from now on come later by what he needs.
        """
        self._forget()
        now = self._clock()
        room_at = now + (refusal.retry_after_s or 0.0)
        due_at = room_at if returning else max(room_at, self._free_at)
        taken_s = refusal.work_s * self._share / PACE
        self._free_at = max(due_at, self._free_at) + taken_s
        wait_s = max(1, math.ceil(due_at - now))
        if len(self._in_turn) < MOST:
            patience_s = PATIENCE_S + PATIENCE_SHARE * wait_s
            due_at = now + wait_s
            place = _Place(due_at, due_at + patience_s, refusal.work_s, fingerprint)
            insort(self._in_turn, place)
            insort(self._by_fingerprint.setdefault(fingerprint, []), place)
        message = f"{refusal.message} Try again in {wait_s} s."
        return Overloaded(message, refusal.param, float(wait_s), refusal.work_s)

    def _forget(self) -> None:
        """Give up those who did not come."""
        now = self._clock()
        while self._in_turn and self._in_turn[0].given_up_at < now:
            self._leave(self._in_turn[0])
            self._count(0.0)

    def _leave(self, place: _Place) -> None:
        self._in_turn.remove(place)
        places = self._by_fingerprint[place.fingerprint]
        places.remove(place)
        if not places:
            del self._by_fingerprint[place.fingerprint]

    def _count(self, came: float) -> None:
        self._share = max(_LEAST_SHARE, self._share + _WEIGHT * (came - self._share))
