"""Retry reservations: a rejected request that returns after its retry time finds room.

A rejected request gets a time at which there is room for it, after all earlier reservations. When
it returns then, it is recognised by its content. The engine keeps a reserve of time for such
retries, which first attempts do not get. No work waits for that: an idle engine admits any request.

Each gateway replica keeps its own reservations and does not know those of the others. The engine's
reserve compensates for that in part.
"""

import hashlib
import math
import time
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from serve_app.errors import Overloaded
from serve_app.gateway.retry_after import whole_seconds

PACE = 0.7
"""Share of the time that is reserved. The rest is for unforeseen work, and for first attempts that
fit in between. In simulations of three times too much work, 0.7 finishes 7 to 15 % more images in
time than 0.9, and does 5 to 8 % more work; 0.6 adds little."""

MAX_RESERVATIONS = 10_000
"""Reservations at a time. Beyond them a request still gets a time, but is not recognised then."""

PATIENCE_S, PATIENCE_SHARE = 5.0, 0.25
"""Time for which a reservation is kept after it is due, the second as a share of the wait, because
clients round."""

LATE_S = 1.0
"""Seconds after which a retry is unlikely to come."""

_MEMORY = 50.0
"""Reservations whose outcome decides which share of the next is expected to be redeemed."""

_TRUST = 5.0
"""Redeemed reservations that are assumed at the start."""

_LEAST_SHARE = 0.001


def fingerprint(parts: Iterable[bytes]) -> bytes:
    """Return the identity by which a retry of a request is recognised."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return digest.digest()


@dataclass(frozen=True, order=True)
class _Reservation:
    due_at: float
    expires_at: float
    work_s: float
    fingerprint: bytes


class RetryReservations:
    """The reservations of one gateway replica, for requests of one priority."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._by_time: list[_Reservation] = []
        self._work_s = 0.0  # of all of them
        self._by_fingerprint: dict[bytes, list[_Reservation]] = {}
        self._late_until = -math.inf  # all that were due by then are redeemed or late
        self._redeemed = self._came_due = _TRUST

    def __len__(self) -> int:
        """Return the number of reservations that are kept."""
        return sum(map(len, self._by_fingerprint.values()))

    def redeem(self, fingerprint: bytes) -> bool:
        """Use up a due reservation of this request; return whether there was one."""
        self._expire()
        reservations = self._by_fingerprint.get(fingerprint)
        if not reservations or reservations[0].due_at > self._clock():
            return False
        reservation = reservations[0]
        self._remove(reservation)
        self._redeemed += 1
        if reservation.due_at > self._late_until:  # else it was counted when it was late
            self._came_due += 1
        return True

    def due_within_s(self, seconds: float) -> float:
        """Return the expected work, in seconds, of retries due within that time.

        A reservation that is more than `LATE_S` late is kept, but not counted.
        """
        self._expire()
        first = self._index_after(self._late_until)
        last = self._index_after(self._clock() + seconds)
        due = self._by_time[first:last]
        return sum(reservation.work_s for reservation in due) * self._share

    def reserve(
        self, fingerprint: bytes, rejection: Overloaded, is_retry: bool, images: int = 1
    ) -> Overloaded:
        """Reserve a retry of a rejected request; return the rejection with the time for it.

        Args:
            fingerprint: identity of the request.
            rejection: the engine's answer for one of its images.
            is_retry: the request redeemed a reservation and found no room. It does not wait behind
                the other reservations again.
            images: number of images of the request.
        """
        self._expire()
        now = self._clock()
        room_in_s = rejection.retry_after_s or 0.0
        if not is_retry:
            room_in_s += self._work_s * self._share / PACE
        wait_s = whole_seconds(room_in_s)
        work_s = rejection.work_s * images
        if len(self._by_time) < MAX_RESERVATIONS:
            due_at = now + wait_s
            patience_s = PATIENCE_S + PATIENCE_SHARE * wait_s
            reservation = _Reservation(due_at, due_at + patience_s, work_s, fingerprint)
            insort(self._by_time, reservation)
            insort(self._by_fingerprint.setdefault(fingerprint, []), reservation)
            self._work_s += work_s
        message = f"{rejection.message} There will be room in {wait_s} s."
        return Overloaded(message, rejection.param, float(wait_s), work_s)

    @property
    def _share(self) -> float:
        """Share of the reservations that is expected to be redeemed, from recent ones."""
        return max(_LEAST_SHARE, min(1.0, self._redeemed / self._came_due))

    def _index_after(self, at: float) -> int:
        return bisect_right(self._by_time, at, key=lambda reservation: reservation.due_at)

    def _expire(self) -> None:
        """Count late reservations, and drop expired ones."""
        now = self._clock()
        late = self._index_after(now - LATE_S) - self._index_after(self._late_until)
        self._late_until = now - LATE_S
        self._came_due += late
        if self._came_due > _MEMORY:
            fading = _MEMORY / self._came_due
            self._came_due *= fading
            self._redeemed *= fading
        while self._by_time and self._by_time[0].expires_at < now:
            self._remove(self._by_time[0])

    def _remove(self, reservation: _Reservation) -> None:
        self._by_time.remove(reservation)
        reservations = self._by_fingerprint[reservation.fingerprint]
        reservations.remove(reservation)
        if not reservations:
            del self._by_fingerprint[reservation.fingerprint]
        self._work_s = self._work_s - reservation.work_s if self._by_time else 0.0
