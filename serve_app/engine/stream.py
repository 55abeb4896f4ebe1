"""The events of one request, as an iterator."""

import queue
from collections.abc import Callable, Iterator

from serve_app.protocol.events import Completed, Event, Failed


class EventStream(Iterator[Event]):
    """The events of one request, in their order.

    The iterator waits for each event, and ends after `Completed` or `Failed`. It waits for the
    device before a `Completed`, because an image that is not finite is a `Failed`. Closing it, or
    deleting it, cancels the request.
    """

    def __init__(self, events: "queue.SimpleQueue[Event]", cancel: Callable[[], None]) -> None:
        self._events = events
        self._cancel = cancel
        self._ended = False

    def __next__(self) -> Event:
        """Wait for the next event."""
        if self._ended:
            raise StopIteration
        event = self._events.get()
        if isinstance(event, Completed) and (error := event.result.not_finite()) is not None:
            event = Failed(error)
        self._ended = isinstance(event, Completed | Failed)
        return event

    def close(self) -> None:
        """Cancel the request if it has not ended. Its remaining events are not returned."""
        if not self._ended:
            self._ended = True
            self._cancel()

    def __del__(self) -> None:
        self.close()
