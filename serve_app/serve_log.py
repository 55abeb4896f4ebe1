"""Log lines among Serve's: in its files and on its console, with replica and request id.

They have its format as well, text or JSON, which ``logging_config`` in the Serve config sets.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

REPEATED_AFTER_S = 30.0
"""Least time between two warnings of the same text."""

MAX_VARIANTS = 5
"""Warnings of one line of code with different numbers, as "request 7 failed", in that time."""

_REMEMBERED = 256


@dataclass
class _Recent:
    """The recent warnings of one line of code."""

    since: float
    texts: set[str] = field(default_factory=set)
    left_out: int = 0


class WithoutRepeats(logging.Handler):
    """A log handler that passes records to another logger, and drops repeated warnings.

    The last warning that is passed on notes that more are left out. The next one after
    `REPEATED_AFTER_S` notes their number.
    """

    def __init__(self, to: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._to = to
        self._clock = clock
        self._recent: OrderedDict[tuple[object, ...], _Recent] = OrderedDict()

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING or self._is_new(record):
            self._to.handle(record)

    def _is_new(self, record: logging.LogRecord) -> bool:
        """Return whether to pass a record on; note in it how many others are dropped."""
        line = record.name, record.levelno, record.lineno, str(record.msg)
        text, now, notes = record.getMessage(), self._clock(), []
        recent = self._recent.pop(line, None)
        if recent is None or now - recent.since >= REPEATED_AFTER_S:
            if recent is not None and recent.left_out:
                notes.append(f"{recent.left_out} more like it before")
            recent = _Recent(now)
        self._recent[line] = recent
        if len(self._recent) > _REMEMBERED:
            self._recent.popitem(last=False)
        if text in recent.texts or len(recent.texts) == MAX_VARIANTS:
            recent.left_out += 1
            return False
        recent.texts.add(text)
        if len(recent.texts) == MAX_VARIANTS:
            notes.append(f"more like it are left out for {REPEATED_AFTER_S:g} s")
        if notes:
            record.msg, record.args = f"{text} ({'; '.join(notes)})", None
        return True


def log_through_serve() -> None:
    """Send this package's log to Serve's logger. Each replica and proxy calls it once.

    Serve leaves all loggers but its own to the root logger.
    """
    ours = logging.getLogger("serve_app")
    ours.setLevel(logging.INFO)
    ours.propagate = False
    ours.handlers = [WithoutRepeats(logging.getLogger("ray.serve"))]
