"""Images as server-sent events, in OpenAI's format."""

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Protocol

from pydantic import BaseModel
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Scope

from serve_app.gateway.errors import problem_of
from serve_app.gateway.schemas import (
    CompletedEvent,
    ErrorDetail,
    ErrorResponse,
    ImageSafety,
    PartialImageEvent,
    ProgressEvent,
)
from serve_app.gateway.service import ImageJob, ImageService, size_of
from serve_app.protocol.backend import GenerationEvent
from serve_app.protocol.events import Progress, Queued, Timeline
from serve_app.protocol.images import EncodedImage, PartialImage

HEARTBEAT_S = 10.0

ACCEPTED_WITHIN_S = 2.0
"""A request that is rejected in this time gets its own status; later, the error is an event of a
200."""


ImageEvent = ProgressEvent | PartialImageEvent | CompletedEvent
"""An event of the images API."""


class EventWriter(Protocol):
    """Writes the events of an API. Each has its name."""

    def begin(self) -> Iterable[tuple[str, BaseModel]]:
        """Return the events that come first."""
        ...

    def write(self, event: ImageEvent) -> Iterable[tuple[str, BaseModel]]:
        """Return the events for one of the images API."""
        ...

    def fail(self, error: ErrorDetail) -> Iterable[tuple[str, BaseModel]]:
        """Return the events that end a stream without an image."""
        ...


class ImageEvents:
    """The events of the images API."""

    def begin(self) -> Iterable[tuple[str, BaseModel]]:
        return ()

    def write(self, event: ImageEvent) -> Iterable[tuple[str, BaseModel]]:
        return ((event.type, event),)

    def fail(self, error: ErrorDetail) -> Iterable[tuple[str, BaseModel]]:
        return (("error", ErrorResponse(error=error)),)


async def stream(
    service: ImageService, job: ImageJob, scope: Scope, writer: EventWriter | None = None
) -> EventSourceResponse:
    """Answer with the events of the only image of ``job``: those of the images API by default.

    Raises:
        DiffusionServeError: if it is rejected at once.
    """
    events = service.stream(job)
    first = asyncio.ensure_future(anext(events))
    try:
        await asyncio.wait({first}, timeout=ACCEPTED_WITHIN_S)
        if first.done():
            first.result()
    except BaseException:
        first.cancel()
        raise
    sent = _sent(job, first, events, scope, writer or ImageEvents())
    return EventSourceResponse(sent, ping=HEARTBEAT_S)


async def completed(service: ImageService, job: ImageJob) -> CompletedEvent:
    """Generate the only image of ``job``, and return the last event of its stream."""
    async with aclosing(service.stream(job)) as events:
        async for received in events:
            event = _event(job, received)
            if isinstance(event, CompletedEvent):
                return event
    raise AssertionError("the backend ended without an image")


async def _sent(
    job: ImageJob,
    first: "asyncio.Future[GenerationEvent]",
    events: AsyncGenerator[GenerationEvent, None],
    scope: Scope,
    writer: EventWriter,
) -> AsyncGenerator[ServerSentEvent, None]:
    try:
        async with aclosing(events):
            try:
                for name, data in writer.begin():
                    yield _framed(name, data)
                received = await first
            finally:
                first.cancel()
            while True:
                if (event := _event(job, received)) is not None:
                    for name, data in writer.write(event):
                        yield _framed(name, data)
                if isinstance(received, EncodedImage):
                    return
                received = await anext(events)
    except Exception as error:  # noqa: BLE001  the status is sent: what went wrong is an event
        for name, data in writer.fail(problem_of(error, scope).detail):
            yield _framed(name, data)


def _framed(name: str, data: BaseModel) -> ServerSentEvent:
    return ServerSentEvent(data.model_dump_json(), event=name)


def _event(job: ImageJob, event: GenerationEvent) -> ImageEvent | None:
    """Convert an event for the client; ``None`` if it did not request such events."""
    kind, body = job.kind, job.body
    match event:
        case Queued():
            if not body.progress:
                return None
            return ProgressEvent(
                type=f"{kind}.progress",
                step=0,
                total_steps=job.steps,
                queue_position=event.position,
                eta_s=event.eta_s,
            )
        case Progress():
            return ProgressEvent(
                type=f"{kind}.progress",
                step=event.step,
                total_steps=event.total_steps,
                queue_position=None,
                eta_s=event.eta_s or 0.0,
            )
        case Timeline():
            return None
        case PartialImage():
            job.record.previewed()
            return PartialImageEvent(
                type=f"{kind}.partial_image",
                partial_image_index=event.index,
                b64_json=base64.b64encode(event.data).decode(),
                created_at=int(time.time()),
                size=job.size,
                quality=body.resolved_quality,
                output_format=body.output_format,
            )
        case EncodedImage():
            return CompletedEvent(
                type=f"{kind}.completed",
                b64_json=base64.b64encode(event.data).decode(),
                created_at=int(time.time()),
                size=size_of(event),
                quality=body.resolved_quality,
                output_format=body.output_format,
                usage=job.usage([event]),
                safety_identifier=body.end_user,
                seed=event.seed,
                safety=ImageSafety.of(event.safety),
                timings=job.record.complete(),
                warnings=job.all_warnings([event]),
            )
