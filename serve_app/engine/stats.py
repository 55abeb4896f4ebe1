"""A snapshot of the engine and a short log of its requests, for tests and for debugging."""

from collections import deque
from dataclasses import dataclass
from typing import Literal

RequestEvent = Literal[
    "queued", "rejected", "started", "cancel_requested", "completed", "failed", "cancelled"
]


@dataclass(frozen=True)
class LogEntry:
    """One event of one request."""

    denoiser_call: int
    """Number of denoiser calls made before the event."""
    request: int
    what: RequestEvent


class RequestLog:
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
    """Work of an engine, now and since its start."""

    waiting: int
    running: int
    denoiser_calls: int
    steps: int
    """Requests in denoiser calls, summed over the calls that succeeded."""
    forecast_error: float | None
    """Median relative error of the recent predictions of completion times."""
    log: tuple[LogEntry, ...]
    """Last few hundred events, the oldest first."""

    @property
    def mean_batch_size(self) -> float:
        return self.steps / self.denoiser_calls if self.denoiser_calls else 0.0
