"""Our log lines among Serve's: in its files and on its console, with replica and request id.

In its format as well, text or JSON, as ``logging_config`` in the Serve config says.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

REPEATED_AFTER_S = 30.0
"""A warning in the same words comes no sooner again."""

FEW = 5
"""With other numbers, as "request 7 failed", it comes so often in that time."""

_REMEMBERED = 256


@dataclass
class _Said:
    """What one line of code lately warned of."""

    since: float
    texts: set[str] = field(default_factory=set)
    left_out: int = 0


class WithoutRepeats(logging.Handler):
    """Hands records on to another logger; of the same warning again and again only a few in so many
    seconds. The last of them says that more are left out, the next one how many were."""

    def __init__(self, to: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._to = to
        self._clock = clock
        self._said: OrderedDict[tuple[object, ...], _Said] = OrderedDict()

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING or self._is_news(record):
            self._to.handle(record)

    def _is_news(self, record: logging.LogRecord) -> bool:
        """Whether to hand it on, with a word on those that are not."""
        line = record.name, record.levelno, record.lineno, str(record.msg)
        text, now, notes = record.getMessage(), self._clock(), []
        said = self._said.pop(line, None)
        if said is None or now - said.since >= REPEATED_AFTER_S:
            if said is not None and said.left_out:
                notes.append(f"{said.left_out} more like it before")
            said = _Said(now)
        self._said[line] = said
        if len(self._said) > _REMEMBERED:
            self._said.popitem(last=False)
        if text in said.texts or len(said.texts) == FEW:
            said.left_out += 1
            return False
        said.texts.add(text)
        if len(said.texts) == FEW:
            notes.append(f"more like it are left out for {REPEATED_AFTER_S:g} s")
        if notes:
            record.msg, record.args = f"{text} ({'; '.join(notes)})", None
        return True


def log_through_serve() -> None:
    """Called once in each replica and proxy: Serve leaves loggers not its own to the root's."""
    ours = logging.getLogger("serve_app")
    ours.setLevel(logging.INFO)
    ours.propagate = False
    ours.handlers = [WithoutRepeats(logging.getLogger("ray.serve"))]
