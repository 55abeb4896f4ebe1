"""Our log lines among Serve's: in its files and on its console, with replica and request id.

In its format as well, text or JSON, as ``logging_config`` in the Serve config says.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable

REPEATED_AFTER_S = 30.0
"""A warning in the same words comes no sooner again."""

_REMEMBERED = 256


class WithoutRepeats(logging.Handler):
    """Hands records on to another logger; of the same warning again and again only every so many
    seconds one, which says how many it stands for."""

    def __init__(self, to: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._to = to
        self._clock = clock
        self._said: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            key, now = (record.name, record.getMessage()), self._clock()
            said_at, left_out = self._said.pop(key, (None, 0))
            if said_at is not None and now - said_at < REPEATED_AFTER_S:
                self._said[key] = (said_at, left_out + 1)
                return
            self._said[key] = (now, 0)
            if len(self._said) > _REMEMBERED:
                self._said.popitem(last=False)
            if left_out:
                record.msg, record.args = f"{key[1]} ({left_out} times more before)", None
        self._to.handle(record)


def log_through_serve() -> None:
    """Called once in each replica and proxy: Serve leaves loggers not its own to the root's."""
    ours = logging.getLogger("serve_app")
    ours.setLevel(logging.INFO)
    ours.propagate = False
    ours.handlers = [WithoutRepeats(logging.getLogger("ray.serve"))]
