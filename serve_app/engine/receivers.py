"""The receivers of the events of all open requests: each gets exactly one last event.

The engine's thread sends the events. If it does not come back from a call, another thread ends the
requests here.
"""

import logging
from collections.abc import Callable

from serve_app.errors import DiffusionServeError
from serve_app.protocol.events import Completed, Event, Failed

logger = logging.getLogger(__name__)

EventCallback = Callable[[Event], None]
"""Receives the events of one request: must be quick and must not raise.

It runs on the engine's thread, or on another one if that thread is stuck."""


class Receivers:
    """Receivers of requests that have not ended. Any thread may use it."""

    def __init__(self) -> None:
        self._open: dict[int, EventCallback] = {}

    def add(self, number: int, receiver: EventCallback) -> EventCallback:
        """Return a callback for the request's events, which passes nothing on after the last."""
        self._open[number] = receiver

        def send(event: Event) -> None:
            ended = isinstance(event, Completed | Failed)
            # Both operations are atomic, so that only one thread gets the receiver at the end.
            to = self._open.pop(number, None) if ended else self._open.get(number)
            if to is not None:
                to(event)

        return send

    def fail_all(self, error: DiffusionServeError) -> None:
        """End all open requests with this error."""
        for number in list(self._open):
            if (receiver := self._open.pop(number, None)) is not None:
                try:
                    receiver(Failed(error))
                except Exception:
                    logger.exception("request %d: the receiver of its events failed", number)
