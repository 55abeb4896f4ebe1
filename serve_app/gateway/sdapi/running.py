"""The running requests of this API on this gateway replica: their progress, and interrupts."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from serve_app.errors import Cancelled
from serve_app.gateway.requests_log import RequestRecord

Result = TypeVar("Result")


@dataclass(eq=False)
class _Running:
    """A running request."""

    record: RequestRecord
    task: "asyncio.Task[Any]"
    interrupted: bool = False

    @property
    def progress(self) -> float:
        """Share of its images' steps that are done."""
        images = self.record.images
        return sum(self.record.done.get(image.seed, 0.0) for image in images) / (len(images) or 1)

    @property
    def remaining_s(self) -> float:
        """Seconds until it is done, at its pace so far; 0 while it has none."""
        done = self.progress
        return self.record.age_s * (1 - done) / done if done else 0.0


@dataclass(frozen=True)
class Overview:
    """The progress of a key's requests together."""

    requests: int
    progress: float
    """From 0 to 1; 0 without any request."""
    remaining_s: float
    step: int
    """Steps that are done of the oldest request's images, on average."""
    steps: int
    """Steps of each of its images."""


class RunningRequests:
    """Requests by the names of their keys. One event loop uses it."""

    def __init__(self) -> None:
        self._running: dict[_Running, None] = {}

    async def run(
        self, record: RequestRecord, work: Callable[[], Coroutine[Any, Any, Result]]
    ) -> Result:
        """Do the work of a request, which `interrupt` may cancel.

        Raises:
            Cancelled: it was interrupted.
        """
        task = asyncio.create_task(work())
        running = _Running(record, task)
        self._running[running] = None
        try:
            return await task
        except asyncio.CancelledError:
            if running.interrupted:
                raise Cancelled("POST /sdapi/v1/interrupt ended the request.") from None
            raise
        finally:
            del self._running[running]

    def interrupt(self, principal: str) -> None:
        """Cancel the requests of a key."""
        for running in self._of(principal):
            running.interrupted = True
            running.task.cancel()

    def overview(self, principal: str) -> Overview:
        """Summarize the requests of a key."""
        found = list(self._of(principal))
        if not found:
            return Overview(0, 0.0, 0.0, 0, 0)
        steps = found[0].record.images[0].steps_to_run if found[0].record.images else 0
        return Overview(
            requests=len(found),
            progress=sum(running.progress for running in found) / len(found),
            remaining_s=max(running.remaining_s for running in found),
            step=int(found[0].progress * steps),
            steps=steps,
        )

    def _of(self, principal: str) -> Iterator[_Running]:
        return (running for running in self._running if running.record.principal == principal)
