"""Images as server-sent events, in OpenAI's format."""

import asyncio
import base64
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from pydantic import BaseModel
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Scope

from serve_app.gateway.errors import problem_of
from serve_app.gateway.schemas import (
    CompletedEvent,
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


async def stream(service: ImageService, job: ImageJob, scope: Scope) -> EventSourceResponse:
    """Answer with the events of the only image of ``job``.

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
    return EventSourceResponse(_sent(job, first, events, scope), ping=HEARTBEAT_S)


async def _sent(
    job: ImageJob,
    first: "asyncio.Future[GenerationEvent]",
    events: AsyncGenerator[GenerationEvent, None],
    scope: Scope,
) -> AsyncGenerator[ServerSentEvent, None]:
    try:
        async with aclosing(events):
            try:
                received = await first
            finally:
                first.cancel()
            while True:
                if (event := _event(job, received)) is not None:
                    yield _framed(event.type, event)
                if isinstance(received, EncodedImage):
                    return
                received = await anext(events)
    except Exception as error:  # noqa: BLE001  the status is sent: what went wrong is an event
        yield _framed("error", ErrorResponse(error=problem_of(error, scope).detail))


def _framed(name: str, data: BaseModel) -> ServerSentEvent:
    return ServerSentEvent(data.model_dump_json(), event=name)


def _event(
    job: ImageJob, event: GenerationEvent
) -> ProgressEvent | PartialImageEvent | CompletedEvent | None:
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
                seed=event.seed,
                safety=ImageSafety.of(event.safety),
                timings=job.record.complete(),
                warnings=job.all_warnings([event]),
            )
