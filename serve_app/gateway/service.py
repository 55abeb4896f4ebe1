"""From a parsed request to pictures: what the two image endpoints have in common."""

import asyncio
import base64
import functools
import math
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from serve_app.config import AppConfig
from serve_app.errors import InvalidRequest, ModelNotFound, Overloaded
from serve_app.gateway.auth import Principal
from serve_app.gateway.requests_log import Record
from serve_app.gateway.retry_reservations import RetryReservations, fingerprint
from serve_app.gateway.schemas import (
    ImageData,
    ImageEditRequest,
    ImageRequest,
    ImagesResponse,
    InputTokensDetails,
    Kind,
    Timings,
    Usage,
)
from serve_app.gateway.uploads import apart, read_image, read_mask
from serve_app.metrics import REFUSALS
from serve_app.protocol.backend import GenerationBackend, GenerationEvent
from serve_app.protocol.events import Queued, Timeline
from serve_app.protocol.images import EncodedImage
from serve_app.protocol.params import (
    MAX_SEED,
    GenerationParams,
    ModelInfo,
    Priority,
    RequestContext,
)

TOKEN_PX = 16
"""Side of the square that counts as one token: what models with patches of latents work on."""


@dataclass(frozen=True)
class ImageJob:
    """A request that was found right, with everything that an answer repeats of it."""

    kind: Kind
    body: ImageRequest
    pictures: tuple[GenerationParams, ...]
    """Resolved; one for each picture."""
    record: Record
    principal: Principal
    fingerprint: bytes
    """By which it is known if it comes again."""
    context: RequestContext

    @property
    def size(self) -> str:
        return f"{self.pictures[0].width}x{self.pictures[0].height}"

    @property
    def steps(self) -> int:
        return self.pictures[0].steps_to_run

    def usage(self, images: Sequence[EncodedImage]) -> Usage:
        text_tokens = sum(image.prompt_tokens for image in images)
        one = math.prod(math.ceil(side / TOKEN_PX) for side in (images[0].width, images[0].height))
        image_tokens = one * len(images) if self.kind == "image_edit" else 0
        output_tokens = one * len(images)
        return Usage(
            input_tokens=text_tokens + image_tokens,
            input_tokens_details=InputTokensDetails(
                text_tokens=text_tokens, image_tokens=image_tokens
            ),
            output_tokens=output_tokens,
            total_tokens=text_tokens + image_tokens + output_tokens,
        )

    def timings(self) -> Timings:
        """Now that all are painted; it is put on record."""
        assert self.record.painted is not None
        timings = self.record.painted.until(self.record.age_s)
        self.record.completed(timings)
        return timings

    def reached(self, params: GenerationParams, event: GenerationEvent) -> None:
        """Put on record what ``event`` says of how far this picture has come."""
        record = self.record
        match event:
            case Queued():  # again, if the replica that painted it was lost
                timeline = Timeline()
                if event.replica:
                    record.engine_requests[params.seed] = event.replica, event.number
            case Timeline():
                parts_s = parts_by(record.age_s, event.age_s, event.parts_s)
                timeline = replace(event, parts_s=parts_s)
            case EncodedImage():
                now_s = record.age_s
                parts_s = parts_by(now_s, event.age_s, event.parts_s)
                record.painted = Timings.of((*parts_s, max(0.0, now_s - sum(parts_s))))
                timeline = replace(event.timeline or Timeline(), parts_s=parts_s)
            case _:
                return
        if record.sampled:
            record.timelines[params.seed] = timeline


def parts_by(now_s: float, age_s: float, parts_s: Sequence[float]) -> tuple[float, ...]:
    """The parts, by a replica's clock, of a request that is ``now_s`` old and has been there for
    ``age_s``.

    Only durations are compared, for clocks of two machines never agree: what the replica does not
    account for was waiting, for it and on the way from it. One that runs faster says too much,
    which is cut.
    """
    if not parts_s:
        return ()
    queue_s, *others = parts_s
    cut, left_s = [], now_s
    for part_s in (max(0.0, now_s - age_s) + queue_s, *others):
        cut.append(min(part_s, left_s))
        left_s -= cut[-1]
    return tuple(cut)


class ImageService:
    """Takes orders and has them painted."""

    def __init__(self, config: AppConfig, backend: GenerationBackend) -> None:
        self._config = config
        self._limits = config.engine.limits
        self._backend = backend
        self._queue_full = REFUSALS.labels(config.model.id, "queue")
        self._reservations: dict[Priority, RetryReservations] = {
            "interactive": RetryReservations(),
            "batch": RetryReservations(),
        }

    async def take(
        self,
        kind: Kind,
        body: ImageRequest,
        record: Record,
        principal: Principal,
        image: bytes | None = None,
        mask: bytes | None = None,
    ) -> ImageJob:
        """Check everything about a request that can be checked before it is painted.

        Raises:
            InvalidRequest: naming the field and what is allowed.
            Unavailable: if no replica is there to say what the model takes.
        """
        sent_at = time.time()
        body.check()
        if body.model is not None and body.model != self._config.model.id:
            raise ModelNotFound(
                f"no model {body.model[:100]!r} here; there is {self._config.model.id!r}.", "model"
            )
        if body.n > self._limits.max_images:
            raise InvalidRequest(f"n must be from 1 to {self._limits.max_images}.", "n")
        model = await self._describe_for(body)
        params = replace(self._params(body, model), priority=principal.priority)
        if image is None:
            params = params.resolved(model)
        else:
            params = await apart(functools.partial(self._with_pictures, params, image, mask, model))
        params = params.with_previews(body.partial_images)
        # The seeds of several pictures follow each other, downwards at the end of the range.
        step = 1 if params.seed <= MAX_SEED - body.n else -1
        pictures = tuple(
            replace(params, seed=params.seed + step * index) for index in range(body.n)
        )
        record.pictures = pictures
        parts = [principal.name.encode(), kind.encode(), body.model_dump_json().encode()]
        if image is None:
            known_by = fingerprint(parts)
        else:
            known_by = await apart(functools.partial(fingerprint, [*parts, image, mask or b""]))
        reservations = self._reservations[principal.priority]
        is_retry = reservations.claim(known_by)
        most_s = self._config.engine.max_backlog_s
        context = RequestContext(
            order=secrets.token_hex(8),
            sent_at=sent_at,
            is_retry=is_retry,
            reserved_s=(
                0.0
                if is_retry
                else reservations.due_within_s(min(most_s, body.deadline_s or most_s))
            ),
            trace=record.traceparent if record.sampled else "",
        )
        return ImageJob(kind, body, pictures, record, principal, known_by, context)

    async def paint_all(self, order: ImageJob) -> ImagesResponse:
        """All pictures or none: when one fails, or the client goes away, the others are dropped."""
        tasks = [asyncio.ensure_future(self._paint(order, params)) for params in order.pictures]
        try:
            images = await asyncio.gather(*tasks)
        except Overloaded as error:
            raise self._reserved(order, error) from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return ImagesResponse(
            created=int(time.time()),
            data=[
                ImageData(b64_json=base64.b64encode(image.data).decode(), seed=image.seed)
                for image in images
            ],
            size=order.size,
            output_format=order.body.output_format,
            quality=order.body.painted_quality,
            usage=order.usage(images),
            timings=order.timings(),
            warnings=list(dict.fromkeys(text for image in images for text in image.warnings)),
        )

    async def paint(self, order: ImageJob) -> AsyncGenerator[GenerationEvent, None]:
        """The events of its only picture."""
        [params] = order.pictures
        try:
            async with aclosing(self._events(order, params)) as events:
                async for event in events:
                    yield event
        except Overloaded as error:
            raise self._reserved(order, error) from None

    def _reserved(self, order: ImageJob, refusal: Overloaded) -> Overloaded:
        """With the time to come again: for all of its pictures, that they are taken in together."""
        if not refusal.work_s:
            self._queue_full.inc(len(order.pictures))
        if refusal.retry_after_s is None:
            return refusal
        whole = Overloaded(
            refusal.message,
            refusal.param,
            refusal.retry_after_s,
            refusal.work_s * len(order.pictures),
        )
        reservations = self._reservations[order.principal.priority]
        return reservations.promise(order.fingerprint, whole, order.context.is_retry)

    async def _events(
        self, order: ImageJob, params: GenerationParams
    ) -> AsyncGenerator[GenerationEvent, None]:
        """The events of one of its pictures."""
        painting = self._backend.paint(
            params, order.body.encoding(), order.body.progress, order.context
        )
        async with aclosing(painting) as events:
            async for event in events:
                order.reached(params, event)
                yield event

    async def _describe_for(self, body: ImageRequest) -> ModelInfo:
        try:
            return await self._backend.describe(body.deadline_s)
        except Overloaded:
            self._queue_full.inc(body.n)
            raise

    async def _paint(self, order: ImageJob, params: GenerationParams) -> EncodedImage:
        async with aclosing(self._events(order, params)) as events:
            async for event in events:
                if isinstance(event, EncodedImage):
                    return event
        raise AssertionError("the painter ended without a picture")

    def _params(self, body: ImageRequest, model: ModelInfo) -> GenerationParams:
        width, height = body.size_px()
        return GenerationParams(
            prompt=body.prompt,
            # Drawn here, so that a retry on another replica paints the same picture.
            seed=secrets.randbelow(2**32) if body.seed is None else body.seed,
            negative_prompt=body.negative_prompt,
            width=width,
            height=height,
            num_inference_steps=body.steps(model),
            guidance_scale=body.guidance_scale,
            noise_scheduler=body.scheduler,
            lora=body.adapters(),
            deadline_s=body.deadline_s,
            strength=body.strength if isinstance(body, ImageEditRequest) else None,
        )

    def _with_pictures(
        self, params: GenerationParams, image: bytes, mask: bytes | None, model: ModelInfo
    ) -> GenerationParams:
        picture = read_image(image, self._limits)
        mask_image = None if mask is None else read_mask(mask, self._limits, picture.size)
        return replace(params, image=picture, mask_image=mask_image).resolved(model)
