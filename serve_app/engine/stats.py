"""A snapshot of the engine and a short log of its requests, for tests and for debugging."""

from collections import deque
from dataclasses import dataclass
from typing import Literal

RequestEvent = Literal[
    "queued", "rejected", "started", "cancel_requested", "completed", "failed", "cancelled"
]


@dataclass(frozen=True)
class LogEntry:
    """One entry of the engine's log: an event of a request."""

    denoiser_call: int
    """Number of denoiser calls made before the event."""
    request: int
    """Number of the request in its engine."""
    what: RequestEvent


class EventLog:
    """The last few hundred events. Any thread may append."""

    def __init__(self) -> None:
        self._entries: deque[LogEntry] = deque(maxlen=512)

    def note(self, denoiser_call: int, request: int, what: RequestEvent) -> None:
        self._entries.append(LogEntry(denoiser_call, request, what))

    @property
    def entries(self) -> tuple[LogEntry, ...]:
        """Events, the oldest first."""
        return tuple(self._entries)


@dataclass(frozen=True)
class EngineStats:
    """Counts of an engine, now and since its start."""

    waiting: int
    """Requests that wait in the queue."""
    running: int
    """Requests that run."""
    denoiser_calls: int
    """Denoiser calls since the start."""
    steps: int
    """Requests in denoiser calls, summed over the calls that succeeded."""
    forecast_error: float | None
    """Median relative error of recent predictions of completion times; ``None`` before any."""
    log: tuple[LogEntry, ...]
    """Last few hundred events, the oldest first."""

    @property
    def mean_batch_size(self) -> float:
        """Mean number of requests in a denoiser call."""
        return self.steps / self.denoiser_calls if self.denoiser_calls else 0.0
