"""The life of an engine's thread: it starts, accepts requests, closes, and ends or is stuck.

Any thread may use it. A thread that is stuck in a call cannot end its own requests, so the
watchdog's thread ends them here.
"""

import itertools
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from serve_app.engine.receivers import EventCallback, Receivers
from serve_app.engine.watchdog import Stuck
from serve_app.errors import Unavailable

logger = logging.getLogger(__name__)


class Lifetime:
    """State of one engine's thread."""

    closing: bool = False
    """True once no more requests are accepted."""
    cause: BaseException | None = None
    """The error that ended the thread, or the call in which it is stuck."""

    def __init__(self) -> None:
        self._gate = threading.Lock()  # orders submissions against closing
        self._started = threading.Event()
        self._ended = threading.Event()
        self._numbers = itertools.count(1)
        self._receivers = Receivers()

    @contextmanager
    def submission(self, on_event: EventCallback) -> Iterator[tuple[int, EventCallback]]:
        """Keep the engine from closing; yield the request's number and its only event callback.

        Raises:
            Unavailable: If the engine is closing or has stopped.
        """
        with self._gate:
            if self.closing:
                raise Unavailable("the engine is closing; send the request to another replica.")
            number = next(self._numbers)
            yield number, self._receivers.add(number, on_event)

    # ---- reports of the engine's thread ----------------------------------------------------------

    def start(self) -> None:
        """Report that the engine is ready for requests."""
        self._started.set()

    def crash(self, error: BaseException) -> None:
        """Report what ended the engine."""
        self.cause = self.cause or error
        if self._started.is_set():
            logger.error("the engine has stopped", exc_info=error)

    def close(self) -> None:
        """Accept no more requests."""
        with self._gate:
            self.closing = True

    def end(self) -> None:
        """Report that the thread runs no more calls."""
        self._ended.set()
        self._started.set()

    def give_up(self, stuck: Stuck) -> None:
        """End all requests, as the thread does not come back; called by the watchdog."""
        self.close()
        self.cause = stuck
        self._receivers.fail_all(
            Unavailable("the device does not respond; send the request to another replica.")
        )
        self.end()

    # ---- for all threads -------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """True if the thread has ended or is stuck."""
        return self._ended.is_set()

    def wait_for_start(self) -> None:
        """Wait until the engine is ready, has failed to start, or is stuck in its start."""
        self._started.wait()

    def wait_for_end(self) -> None:
        """Wait until the thread has ended or is stuck."""
        self._ended.wait()
