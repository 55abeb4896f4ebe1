"""Time in a rehearsal: waiting for the cluster, bounded, and telling what is waited for."""

import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from serve_app.doctor.kube import Unreachable
from serve_app.doctor.kube_write import Refused

T = TypeVar("T")

POLL_S = 2.0
"""KubeRay's operator looks at a RayService every 2 s."""

OUTAGE_S = 60.0
"""How long the API server may be away: a control plane's rolling update takes no longer."""

REPEAT_S = 60.0
"""How often an unchanged state is told again."""

TOTAL_S = 3 * 3600.0
"""The longest rehearsal: two starts that pull images and weights, and all other steps."""


class Clock(Protocol):
    """Seconds that pass; a test's clock skips them."""

    def now(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The machine's own clock."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Waiter:
    """Polls until something is there, and tells each new state once."""

    def __init__(self, clock: Clock, tell: Callable[[str], None]) -> None:
        """``tell``: takes each line as it comes."""
        self._clock = clock
        self._tell = tell
        self._started_at = clock.now()
        self._told = ("", 0.0)

    def elapsed_s(self) -> float:
        """Seconds since the rehearsal began."""
        return self._clock.now() - self._started_at

    def tell(self, text: str) -> None:
        """Print one line with its time."""
        self._tell(f"{self.elapsed_s():6.0f} s  {text}")

    def progress(self, text: str) -> None:
        """Print the state if it is new, or was told some time ago."""
        said, at_s = self._told
        if text != said or self.elapsed_s() - at_s >= REPEAT_S:
            self._told = (text, self.elapsed_s())
            self.tell(f"    {text}")

    def until(
        self,
        probe: Callable[[], T | None],
        timeout_s: float,
        between: Callable[[], object] = lambda: None,
        bounded: bool = True,
    ) -> T | None:
        """Return the first value of ``probe`` that is not None; None if it takes too long.

        ``between``: called before each pause; ``bounded``: whether `TOTAL_S` counts as well.

        Raises:
            NotReadable: if the API server refuses a request, or is away for `OUTAGE_S`.
        """
        ends_at = self.elapsed_s() + timeout_s
        if bounded:
            ends_at = min(ends_at, TOTAL_S)
        answered_at = self.elapsed_s()
        while True:
            try:
                value = probe()
                between()
                answered_at = self.elapsed_s()
            except (Unreachable, Refused) as error:
                passes = isinstance(error, Unreachable) or error.status in (429, 500, 502, 503, 504)
                if not passes or self.elapsed_s() - answered_at >= OUTAGE_S:
                    raise
                self.progress(error.found)
                value = None
            if value is not None:
                return value
            if self.elapsed_s() >= ends_at:
                return None
            self._clock.sleep(POLL_S)
