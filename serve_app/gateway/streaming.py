"""Pictures as server-sent events, in OpenAI's words."""

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
    PartialImageEvent,
    ProgressEvent,
)
from serve_app.gateway.service import ImageJob, ImageService
from serve_app.protocol.backend import GenerationEvent
from serve_app.protocol.events import Progress, Queued, Timeline
from serve_app.protocol.images import EncodedImage, PartialImage

HEARTBEAT_S = 10.0

ACCEPTED_WITHIN_S = 2.0
"""A request that is refused in this time gets its own status; later ones are events of a 200."""


async def stream(service: ImageService, order: ImageJob, scope: Scope) -> EventSourceResponse:
    """Answer with the events of the only picture of ``order``.

    Raises:
        DiffusionServeError: if it is refused at once.
    """
    events = service.paint(order)
    first = asyncio.ensure_future(anext(events))
    try:
        await asyncio.wait({first}, timeout=ACCEPTED_WITHIN_S)
        if first.done():
            first.result()
    except BaseException:
        first.cancel()
        raise
    return EventSourceResponse(_sent(order, first, events, scope), ping=HEARTBEAT_S)


async def _sent(
    order: ImageJob,
    first: "asyncio.Future[GenerationEvent]",
    events: AsyncGenerator[GenerationEvent, None],
    scope: Scope,
) -> AsyncGenerator[ServerSentEvent, None]:
    try:
        async with aclosing(events):
            try:
                painted = await first
            finally:
                first.cancel()
            while True:
                if (event := _event(order, painted)) is not None:
                    yield _framed(event.type, event)
                if isinstance(painted, EncodedImage):
                    return
                painted = await anext(events)
    except Exception as error:  # noqa: BLE001  the status is sent: what went wrong is an event
        yield _framed("error", ErrorResponse(error=problem_of(error, scope).detail))


def _framed(name: str, data: BaseModel) -> ServerSentEvent:
    return ServerSentEvent(data.model_dump_json(), event=name)


def _event(
    order: ImageJob, event: GenerationEvent
) -> ProgressEvent | PartialImageEvent | CompletedEvent | None:
    """As the client sees it; none of what it did not ask for."""
    kind, body = order.kind, order.body
    match event:
        case Queued():
            if not body.progress:
                return None
            return ProgressEvent(
                type=f"{kind}.progress",
                step=0,
                total_steps=order.steps,
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
            order.record.previewed()
            return PartialImageEvent(
                type=f"{kind}.partial_image",
                partial_image_index=event.index,
                b64_json=base64.b64encode(event.data).decode(),
                created_at=int(time.time()),
                size=order.size,
                quality=body.painted_quality,
                output_format=body.output_format,
            )
        case EncodedImage():
            return CompletedEvent(
                type=f"{kind}.completed",
                b64_json=base64.b64encode(event.data).decode(),
                created_at=int(time.time()),
                size=order.size,
                quality=body.painted_quality,
                output_format=body.output_format,
                usage=order.usage([event]),
                seed=event.seed,
                timings=order.timings(),
                warnings=list(event.warnings),
            )
