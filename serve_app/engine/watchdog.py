"""The watchdog: notices that the engine's thread does not come back from a call.

A thread that waits for a hung device cannot be interrupted, and it cannot report itself. So the
engine's thread only says what it begins, and a second thread watches how long that lasts. This
module knows durations and names; what follows from a report is up to its caller.
"""

import logging
import sys
import threading
import traceback
from collections.abc import Callable, Hashable
from dataclasses import dataclass

logger = logging.getLogger(__name__)

PREDICTED_TIMES = 20
"""A call may take this many times as long as predicted."""

FIRST_TIMES = 10
"""The first call of its kind may take this many times as long as a later one: it may compile."""

_TICK_S = 1.0
_TICKS = 20
"""Least number of observations before a report."""

_MOST_KINDS = 4_096


class Stuck(Exception):
    """The engine's thread does not come back. The message names the call and its times."""


@dataclass(frozen=True, eq=False, slots=True)
class Task:
    """One call that the engine's thread has begun."""

    what: str
    """Name of the module, or another activity."""
    size: tuple[int, int] | None = None
    """Width and height of its images, in pixels."""
    requests: int = 1
    predicted_s: float = 0.0
    """0 while unknown."""
    kind: Hashable = None
    """Equal for calls that do the same work; ``None`` for one that is always the first."""

    def __str__(self) -> str:
        if self.size is None:
            return self.what
        plural = "" if self.requests == 1 else "s"
        return f"{self.what} ({self.requests} request{plural} of {self.size[0]}x{self.size[1]})"


class Watchdog:
    """Watches one thread, from its own thread, until `stop`.

    A call is stuck once it has lasted ``after_s`` and `PREDICTED_TIMES` times its prediction. The
    first call of a kind may take `FIRST_TIMES` times ``after_s``: it may choose kernels, compile,
    load adapters, or move weights between host and device. Time counts in observations of this
    process, so that a suspended machine or a stopped process is not a stuck call.
    """

    def __init__(self, after_s: float, on_stuck: Callable[[Stuck], None]) -> None:
        """Set the limit. ``on_stuck`` is called at most once, on the watchdog's thread."""
        self._after_s = after_s
        self._on_stuck = on_stuck
        self._task: Task | None = None
        self._known: set[Hashable] = set()  # kinds of calls that have ended
        self._watched: int | None = None
        self._seen: Task | None = None  # at the last observation
        self._age_s = 0.0  # observed, of that call
        self._share = 0.0
        self._reported: Stuck | None = None
        self._stopped = threading.Event()

    # ---- the watched thread ----------------------------------------------------------------------

    def start(self) -> None:
        """Watch the calling thread."""
        self._watched = threading.get_ident()
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def begin(self, task: Task | None) -> None:
        """Note what begins now, which ends what was noted before. ``None`` may last for ever."""
        previous = self._task
        if previous is not None and previous.kind is not None:
            if len(self._known) >= _MOST_KINDS:
                self._known.clear()
            self._known.add(previous.kind)
        self._task = task

    def begin_start_up(self, site: str) -> None:
        """Note a call of the start-up, which is always allowed the time of a first call.

        Raises:
            Stuck: If an earlier one was reported: nobody waits for this start any more.
        """
        if self._reported is not None:
            raise self._reported
        self.begin(Task(f"{site}, at start-up"))

    def stop(self) -> None:
        """End the watch."""
        self._stopped.set()

    # ---- any thread ------------------------------------------------------------------------------

    def share(self) -> float:
        """Return the duration of the running call, as a share of the allowed one."""
        return self._share

    def allowed_s(self, task: Task) -> float:
        """Return how many seconds a call may take."""
        first = task.kind is None or task.kind not in self._known
        least_s = self._after_s * (FIRST_TIMES if first else 1)
        return max(least_s, PREDICTED_TIMES * task.predicted_s)

    # ---- the watchdog's thread -------------------------------------------------------------------

    def _run(self) -> None:
        tick_s = min(_TICK_S, self._after_s / _TICKS)
        while not self._stopped.wait(tick_s):
            if (stuck := self.observe(tick_s)) is not None:
                frame = sys._current_frames().get(self._watched or 0)
                stack = "".join(traceback.format_stack(frame)) if frame else ""
                del frame  # it holds tensors
                logger.critical("the engine is stuck: %s. Its thread is here:\n%s", stuck, stack)
                self._reported = stuck
                self._on_stuck(stuck)
                return

    def observe(self, passed_s: float) -> Stuck | None:
        """Count ``passed_s`` for a call that ran before; return a report once it is stuck."""
        task = self._task
        self._age_s = self._age_s + passed_s if task is self._seen else 0.0
        self._seen = task
        if task is None:
            self._share = 0.0
            return None
        allowed_s = self.allowed_s(task)
        self._share = self._age_s / allowed_s
        if self._age_s <= allowed_s:
            return None
        predicted = f"{task.predicted_s:.3g} s" if task.predicted_s else "unknown"
        return Stuck(
            f"{task} has not ended after {self._age_s:.3g} s: its predicted time is {predicted}, "
            f"its limit {allowed_s:.3g} s (engine.stuck_after_s)"
        )
