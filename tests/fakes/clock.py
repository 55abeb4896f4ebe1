"""A clock that only the test advances."""

from collections.abc import Callable


class ManualClock:
    """Seconds that pass only when a test, or the code under test, sleeps."""

    def __init__(self, *on_advance: Callable[[float], None], start_s: float = 0.0) -> None:
        """Call each of ``on_advance`` with the time after every advance."""
        self._now_s = start_s
        self._on_advance = on_advance

    def now(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        self._now_s += seconds
        for notify in self._on_advance:
            notify(self._now_s)

    def advance_to(self, at_s: float) -> None:
        """Advance to exactly ``at_s``, if that is in the future; sums of floats may miss it."""
        if at_s > self._now_s:
            self._now_s = at_s
            self.advance(0.0)

    def sleep(self, seconds: float) -> None:
        """Return at once, with the clock advanced by ``seconds``."""
        self.advance(seconds)
