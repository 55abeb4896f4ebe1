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
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from serve_app.errors import Overloaded

PACE = 0.7
"""Share of the time that is promised; the rest is for what was not foreseen, and for those who come
for the first time and fit in between. In simulations of three times too much work that gets 7 to
15 % more pictures done in time than 0.9 does, and 5 to 8 % more work; 0.6 adds little."""

MOST = 10_000
"""Promises at a time. Beyond them one is told when to come, and is not known then."""

PATIENCE_S, PATIENCE_SHARE = 5.0, 0.25
"""A place is kept so long after its time, the second as a share of the wait: clients round."""

LATE_S = 1.0
"""Who is later than that will hardly come."""

_MEMORY = 50.0
"""Promises whose outcome decides how many of the next will be claimed."""

_TRUST = 5.0
"""Claimed promises with which it begins."""

_LEAST_SHARE = 0.001


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


class RetryReservations:
    """Those of one gateway replica, to requests of one class."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._in_turn: list[_Place] = []
        self._work_s = 0.0  # of all of them
        self._by_fingerprint: dict[bytes, list[_Place]] = {}
        self._late_until = -math.inf  # all that were due by then have come or are late
        self._claimed = self._came_due = _TRUST

    def claim(self, fingerprint: bytes) -> bool:
        """Whether such a request was told to come by now; the place is his."""
        self._forget()
        places = self._by_fingerprint.get(fingerprint)
        if not places or places[0].due_at > self._clock():
            return False
        place = places[0]
        self._leave(place)
        self._claimed += 1
        if place.due_at > self._late_until:  # else it was counted when it was late
            self._came_due += 1
        return True

    def due_within_s(self, seconds: float) -> float:
        """Seconds of work of those who will come in the next so many, as far as they were told to.

        Whoever is late by more than a moment will hardly come: his place is kept, and not counted.
        """
        self._forget()
        first = self._index_after(self._late_until)
        last = self._index_after(self._clock() + seconds)
        return sum(place.work_s for place in self._in_turn[first:last]) * self._share

    def promise(self, fingerprint: bytes, refusal: Overloaded, is_retry: bool) -> Overloaded:
        """The refusal with the time to come again, which is noted.

        ``is_retry``: who came as told and found no room. He need not stand in line again.
        """
        self._forget()
        now = self._clock()
        wait_s = refusal.retry_after_s or 0.0
        if not is_retry:
            wait_s += self._work_s * self._share / PACE
        wait_s = max(1, math.ceil(wait_s))
        if len(self._in_turn) < MOST:
            due_at = now + wait_s
            patience_s = PATIENCE_S + PATIENCE_SHARE * wait_s
            place = _Place(due_at, due_at + patience_s, refusal.work_s, fingerprint)
            insort(self._in_turn, place)
            insort(self._by_fingerprint.setdefault(fingerprint, []), place)
            self._work_s += place.work_s
        message = f"{refusal.message} There will be room in {wait_s} s."
        return Overloaded(message, refusal.param, float(wait_s), refusal.work_s)

    @property
    def _share(self) -> float:
        """Of the promises that will be claimed, as far as the last ones tell."""
        return max(_LEAST_SHARE, min(1.0, self._claimed / self._came_due))

    def _index_after(self, at: float) -> int:
        return bisect_right(self._in_turn, at, key=lambda place: place.due_at)

    def _forget(self) -> None:
        """Count who is late, and give up who is too late."""
        now = self._clock()
        late = self._index_after(now - LATE_S) - self._index_after(self._late_until)
        self._late_until = now - LATE_S
        self._came_due += late
        if self._came_due > _MEMORY:
            fading = _MEMORY / self._came_due
            self._came_due *= fading
            self._claimed *= fading
        while self._in_turn and self._in_turn[0].given_up_at < now:
            self._leave(self._in_turn[0])

    def _leave(self, place: _Place) -> None:
        self._in_turn.remove(place)
        places = self._by_fingerprint[place.fingerprint]
        places.remove(place)
        if not places:
            del self._by_fingerprint[place.fingerprint]
        self._work_s = self._work_s - place.work_s if self._in_turn else 0.0
