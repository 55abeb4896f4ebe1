"""From a parsed request to images: what the two image endpoints have in common."""

import asyncio
import base64
import functools
import math
import secrets
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TypeVar

from serve_app.config.models import AppConfig
from serve_app.errors import InvalidRequest, Overloaded
from serve_app.gateway.auth import Principal
from serve_app.gateway.edit_images import check_number, with_images
from serve_app.gateway.file_text import TextTooLong, with_text
from serve_app.gateway.image_request import ImageEditRequest, ImageRequest
from serve_app.gateway.infotext import infotext
from serve_app.gateway.input_images import MaskReader, in_image_thread, read_mask
from serve_app.gateway.model_names import ModelNames
from serve_app.gateway.requests_log import RequestRecord
from serve_app.gateway.retry_reservations import RetryReservations, fingerprint
from serve_app.gateway.schemas import (
    ImageData,
    ImageLink,
    ImageOperation,
    ImageSafety,
    ImagesAnswer,
    ImagesResponse,
    InputTokensDetails,
    OutputTokensDetails,
    Usage,
)
from serve_app.metrics.engine import REJECTIONS
from serve_app.protocol.backend import GenerationBackend, GenerationEvent
from serve_app.protocol.images import EncodedImage, ImageFormat
from serve_app.protocol.params import (
    MAX_SEED,
    GenerationParams,
    ModelInfo,
    Priority,
    RequestContext,
)

Answer = TypeVar("Answer", bound=ImagesAnswer)

TOKEN_PX = 16
"""Side of the square that counts as one token: what models with patches of latents work on."""


@dataclass(frozen=True)
class ImageJob:
    """A validated request, with everything that its answer repeats."""

    kind: ImageOperation
    body: ImageRequest
    images: tuple[GenerationParams, ...]
    """Resolved parameters, one for each image."""
    record: RequestRecord
    principal: Principal
    fingerprint: bytes
    """Identity of the request, by which a retry of it is recognised."""
    context: RequestContext
    warnings: tuple[str, ...] = ()
    """Parts of the request without effect: fields, or parts of the input files."""
    embeds: bool = False
    """Write the parameters into the files."""

    @property
    def size(self) -> str:
        """Requested size, which most pipelines generate."""
        return f"{self.images[0].width}x{self.images[0].height}"

    @property
    def steps(self) -> int:
        return self.images[0].steps_to_run

    def warned(self, warnings: Iterable[str]) -> "ImageJob":
        """Return the same job with more warnings."""
        return replace(self, warnings=(*self.warnings, *warnings))

    def all_warnings(self, images: Sequence[EncodedImage]) -> list[str]:
        """Return the warnings of the input and of these images, each once."""
        texts = list(self.warnings)
        if (generated := size_of(images[0])) != self.size:
            texts.append(
                f"size is {generated}, not {self.size}: the model's pipeline sets the number of "
                "pixels itself."
            )
        texts += (text for image in images for text in image.warnings)
        return list(dict.fromkeys(texts))

    def answer(
        self,
        kind: type[Answer],
        data: Sequence[ImageData | ImageLink],
        images: Sequence[EncodedImage],
    ) -> Answer:
        """Make the response of this kind for images, and note that it is complete."""
        return kind(
            created=int(time.time()),
            data=data,
            size=size_of(images[0]),
            output_format=self.body.output_format,
            quality=self.body.resolved_quality,
            usage=self.usage(images),
            safety_identifier=self.body.end_user,
            timings=self.record.complete(),
            warnings=self.all_warnings(images),
        )

    def usage(self, images: Sequence[EncodedImage]) -> Usage:
        text_tokens = sum(image.prompt_tokens for image in images)
        one = _tokens((images[0].width, images[0].height))
        image_tokens = 0
        if self.kind == "image_edit":  # the first input image is scaled to the generated size
            further = sum(_tokens(image.size) for image in self.images[0].more_images)
            image_tokens = (one + further) * len(images)
        output_tokens = one * len(images)
        return Usage(
            input_tokens=text_tokens + image_tokens,
            input_tokens_details=InputTokensDetails(
                text_tokens=text_tokens, image_tokens=image_tokens
            ),
            output_tokens=output_tokens,
            output_tokens_details=OutputTokensDetails(image_tokens=output_tokens),
            total_tokens=text_tokens + image_tokens + output_tokens,
        )


def in_base64(job: ImageJob, images: Sequence[EncodedImage]) -> ImagesResponse:
    """Answer with the images themselves."""
    data = [
        ImageData(
            b64_json=base64.b64encode(image.data).decode(),
            seed=image.seed,
            safety=ImageSafety.of(image.safety),
        )
        for image in images
    ]
    return job.answer(ImagesResponse, data, images)


def _tokens(size: tuple[int, int]) -> int:
    """Count the tokens of an image of (width, height)."""
    return math.prod(math.ceil(side / TOKEN_PX) for side in size)


def size_of(image: EncodedImage) -> str:
    """Return the size of an image as in requests."""
    return f"{image.width}x{image.height}"


class ImageService:
    """Prepares image jobs and has a `GenerationBackend` generate their images."""

    def __init__(self, config: AppConfig, backend: GenerationBackend) -> None:
        self._config = config
        self._limits = config.engine.limits
        self._names = ModelNames(config, config.ids)
        self._backend = backend
        self._queue_full = REJECTIONS.labels(config.model.id, "queue")
        self._reservations: dict[Priority, RetryReservations] = {
            "interactive": RetryReservations(),
            "batch": RetryReservations(),
        }

    async def prepare(
        self,
        kind: ImageOperation,
        body: ImageRequest,
        record: RequestRecord,
        principal: Principal,
        images: Sequence[bytes] = (),
        mask: bytes | None = None,
        mask_reader: MaskReader = read_mask,
    ) -> ImageJob:
        """Check and resolve a request, and redeem its reservation if it has one.

        ``images`` are the files of an edit's input images. ``mask_reader`` decodes the mask: APIs
        differ in the part that changes.

        Raises:
            InvalidRequest: naming the field and what is allowed.
            Unavailable: if no replica is there to describe the model.
            Overloaded: if too many requests wait for the first replica.
        """
        sent_at = time.time()
        record.end_user = body.end_user
        names = self._check(body)
        model = await self._describe_for(body)
        params = replace(self._params(body, model), priority=principal.priority)
        warnings: tuple[str, ...] = ()
        check_number(len(images), mask is not None, model)
        if images:
            params, warnings = await with_images(
                params, images, mask, mask_reader, model, self._limits
            )
        else:
            params = params.resolved(model)
        numbered = _numbered(params.with_previews(body.partial_images), body.n)
        record.images = numbered
        identity = await _identity(principal.name, kind, body, images, mask)
        # Last, because it uses up the request's reservation.
        context = self._redeemed(identity, body.deadline_s, principal.priority, sent_at, record)
        warnings = (*names, *body.warnings(), *warnings)
        embeds = self._config.gateway.embed_parameters
        return ImageJob(
            kind, body, numbered, record, principal, identity, context, warnings, embeds
        )

    async def generate_all(self, job: ImageJob) -> ImagesResponse:
        """Generate all images or none, and answer with them."""
        return in_base64(job, await self.images(job))

    async def images(self, job: ImageJob) -> list[EncodedImage]:
        """Generate all images or none.

        When one fails, or the client goes away, the others are cancelled.
        """
        tasks = [
            asyncio.ensure_future(_image_of(self._events(job, params))) for params in job.images
        ]
        try:
            return await asyncio.gather(*tasks)
        except Overloaded as error:
            raise self._reserve(job, error) from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def stream(self, job: ImageJob) -> AsyncGenerator[GenerationEvent, None]:
        """Yield the events of the job's only image."""
        [params] = job.images
        try:
            async with aclosing(self._events(job, params)) as events:
                async for event in events:
                    yield event
        except Overloaded as error:
            raise self._reserve(job, error) from None

    def _redeemed(
        self,
        identity: bytes,
        deadline_s: float | None,
        priority: Priority,
        sent_at: float,
        record: RequestRecord,
    ) -> RequestContext:
        """Redeem the request's reservation if it has one, else leave time for others' retries."""
        reservations = self._reservations[priority]
        is_retry = reservations.redeem(identity)
        max_backlog_s = self._config.engine.max_backlog_s
        within_s = min(max_backlog_s, deadline_s or max_backlog_s)
        return RequestContext(
            order=secrets.token_hex(8),
            sent_at=sent_at,
            is_retry=is_retry,
            reserved_s=0.0 if is_retry else reservations.due_within_s(within_s),
            trace=record.traceparent if record.sampled else "",
        )

    def _reserve(self, job: ImageJob, rejection: Overloaded) -> Overloaded:
        """Count a rejection, and reserve a retry of all images: they are admitted together."""
        if not rejection.work_s:  # by Serve's queue; an engine knows the work, and counts itself
            self._queue_full.inc(len(job.images))
        if rejection.retry_after_s is None:
            return rejection
        reservations = self._reservations[job.principal.priority]
        return reservations.reserve(
            job.fingerprint, rejection, job.context.is_retry, images=len(job.images)
        )

    async def _events(
        self, job: ImageJob, params: GenerationParams
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Yield the events of one image, each of them noted in the request's record."""
        generation = self._backend.generate(
            params, job.body.encoding(), job.body.progress, job.context
        )
        async with aclosing(generation) as events:
            async for event in events:
                job.record.note(params.seed, event)
                if job.embeds and isinstance(event, EncodedImage):
                    event = self._with_parameters(event, params, job.body.output_format)
                yield event

    def _with_parameters(
        self, image: EncodedImage, params: GenerationParams, image_format: ImageFormat
    ) -> EncodedImage:
        """Return the image with its parameters in the file, or else with a warning."""
        text = infotext(params, size_of(image), self._config.model.id)
        try:
            return replace(image, data=with_text(image.data, image_format, text))
        except TextTooLong as error:
            warning = f"the file has no text with the parameters: {error}."
            return replace(image, warnings=(*image.warnings, warning))

    def _check(self, body: ImageRequest) -> tuple[str, ...]:
        """Check the fields that need no model's description, and return warnings."""
        body.check()
        warnings = () if body.model is None else self._names.check(body.model)
        if body.n > self._limits.max_images:
            raise InvalidRequest(
                f"n must be from 1 to {self._limits.max_images}; it is {body.n}.", "n"
            )
        return warnings

    async def _describe_for(self, body: ImageRequest) -> ModelInfo:
        try:
            return await self._backend.describe(body.deadline_s)
        except Overloaded:
            self._queue_full.inc(body.n)
            raise

    def _params(self, body: ImageRequest, model: ModelInfo) -> GenerationParams:
        width, height = body.size_px()
        return GenerationParams(
            prompt=body.prompt,
            # Drawn here, so that a retry on another replica generates the same image.
            seed=secrets.randbelow(2**32) if body.seed is None else body.seed,
            negative_prompt=body.negative_prompt,
            width=width,
            height=height,
            num_inference_steps=body.steps(model),
            guidance_scale=body.guidance_scale,
            noise_scheduler=body.scheduler,
            acceleration=body.level(model),
            lora=body.adapters(),
            deadline_s=body.deadline_s,
            strength=body.strength if isinstance(body, ImageEditRequest) else None,
        )


def _numbered(params: GenerationParams, count: int) -> tuple[GenerationParams, ...]:
    """Return the parameters of each image. Seeds go up; down at the end of their range."""
    step = 1 if params.seed <= MAX_SEED - count else -1
    return tuple(replace(params, seed=params.seed + step * index) for index in range(count))


async def _identity(
    name: str, kind: ImageOperation, body: ImageRequest, images: Sequence[bytes], mask: bytes | None
) -> bytes:
    """Return the fingerprint by which a retry of a request is recognised."""
    parts = [name.encode(), kind.encode(), body.model_dump_json().encode()]
    if not images:
        return fingerprint(parts)
    return await in_image_thread(functools.partial(fingerprint, [*parts, *images, mask or b""]))


async def _image_of(generation: AsyncGenerator[GenerationEvent, None]) -> EncodedImage:
    """Return the image at the end of the events of one."""
    async with aclosing(generation) as events:
        async for event in events:
            if isinstance(event, EncodedImage):
                return event
    raise AssertionError("the backend ended without an image")
