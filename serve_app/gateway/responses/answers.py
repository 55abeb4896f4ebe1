"""Answers and events of this API, as pydantic models, in OpenAI's order."""

import itertools
import secrets
import time
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, Field

from serve_app.gateway.image_request import Quality
from serve_app.gateway.responses.fields import IMAGE_TOOL, ResponsesRequest
from serve_app.gateway.responses.translation import Action, Translation
from serve_app.gateway.schemas import (
    CompletedEvent,
    ErrorDetail,
    ImageSafety,
    PartialImageEvent,
    Timings,
    Usage,
)
from serve_app.gateway.service import ImageJob
from serve_app.gateway.streaming import ImageEvent
from serve_app.protocol.images import ImageFormat

Status = Literal["in_progress", "completed", "failed"]

_NULL = "Always null."

_SEQUENCE = "Number of the event, from 0."
_INDEX = "Always 0: there is one image."
_ITEM = "`id` of the image."


class ImageCall(BaseModel):
    """The image."""

    id: str = Field(description="Random id.")
    type: Literal["image_generation_call"] = Field(
        "image_generation_call", description="Always `image_generation_call`."
    )
    status: Status = Field(description="`completed`, unless it is that of an earlier event.")
    result: str | None = Field(None, description="Image file, in base64. Null before it is done.")
    action: Action = Field(description="`edit` if the request has an image.")
    revised_prompt: None = Field(None, description="Always null: nothing rewrites the prompt.")
    size: str = Field(description="Size of the image, as WIDTHxHEIGHT in pixels.")
    quality: Quality = Field(description="Quality of the request; `medium` for `auto`.")
    background: Literal["opaque"] = Field("opaque", description="Always `opaque`.")
    output_format: ImageFormat = Field(description="File format of the image.")
    seed: int | None = Field(
        None, description="Seed that generates this image again. Null before it is done."
    )
    safety: ImageSafety | None = Field(
        None, description="Verdict of the safety checker. Null if nothing looked at the image."
    )


class WebSearchUsage(BaseModel):
    """Searches. There are none."""

    num_requests: int = Field(0, description="Always 0.")


class ToolUsage(BaseModel):
    """Usage of tools."""

    image_gen: Usage = Field(description="Tokens of the image.")
    web_search: WebSearchUsage = Field(WebSearchUsage(), description="Always 0.")


class ModelInputDetails(BaseModel):
    """Cached tokens of a language model. There are none."""

    cached_tokens: int = Field(0, description="Always 0.")
    cache_write_tokens: int = Field(0, description="Always 0.")


class ModelOutputDetails(BaseModel):
    """Reasoning of a language model. There is none."""

    reasoning_tokens: int = Field(0, description="Always 0.")


class ModelUsage(BaseModel):
    """Tokens of a language model. There is none."""

    input_tokens: int = Field(0, description="Always 0.")
    input_tokens_details: ModelInputDetails = Field(ModelInputDetails(), description="Always 0.")
    output_tokens: int = Field(0, description="Always 0.")
    output_tokens_details: ModelOutputDetails = Field(ModelOutputDetails(), description="Always 0.")
    total_tokens: int = Field(0, description="Always 0.")


class ResponseError(BaseModel):
    """The error of a failed response."""

    code: Literal[
        "server_error",
        "rate_limit_exceeded",
        "invalid_prompt",
        "image_content_policy_violation",
    ] = Field(description="Code of the error, one of OpenAI's.")
    message: str = Field(description="The problem.")


class ResponseObject(BaseModel):
    """A response: OpenAI's fields, then this server's."""

    id: str = Field(description="Random id. The server does not store the response.")
    object: Literal["response"] = Field("response", description="Always `response`.")
    created_at: int = Field(description="Unix time of the request, in seconds.")
    completed_at: int | None = Field(None, description="Unix time of the image, in seconds.")
    status: Status = Field(description="`completed`, unless it is that of another event.")
    background: Literal[False] = Field(False, description="Always false.")
    error: ResponseError | None = Field(None, description="The error of a failed stream, or null.")
    incomplete_details: None = Field(None, description=_NULL)
    instructions: None = Field(None, description=_NULL)
    max_output_tokens: None = Field(None, description=_NULL)
    metadata: dict[str, str] = Field(description="Those of the request.")
    model: str = Field(description="The served model.")
    output: list[ImageCall] = Field(description="The image. Empty before it is begun.")
    parallel_tool_calls: Literal[False] = Field(False, description="Always false.")
    previous_response_id: None = Field(None, description=_NULL)
    store: Literal[False] = Field(False, description="Always false.")
    temperature: None = Field(None, description=_NULL)
    tool_choice: str | dict[str, str] = Field(
        description="`auto`, `required` or the image tool, as in the request."
    )
    tool_usage: ToolUsage | None = Field(
        None, description="Tokens of the image. Null before it is done."
    )
    tools: list[dict[str, Any]] = Field(
        description="The image tool of the request, without its mask."
    )
    top_p: None = Field(None, description=_NULL)
    truncation: Literal["disabled"] = Field("disabled", description="Always `disabled`.")
    usage: ModelUsage | None = Field(
        None, description="Tokens of a language model, which are 0. Null before the image is done."
    )
    user: str | None = Field(description="That of the request.")
    safety_identifier: str | None = Field(
        description="The request's `safety_identifier`, or else its `user`."
    )
    timings: Timings | None = Field(
        None, description="Duration of each part of the request. Null before the image is done."
    )
    warnings: list[str] = Field(
        description="Parts of the request without effect, and images that the safety checker "
        "flagged."
    )


class ResponseEvent(BaseModel):
    """A state of the response."""

    type: str = Field(
        description="`response.created`, `response.in_progress`, `response.completed` or "
        "`response.failed`.",
        examples=["response.completed"],
    )
    sequence_number: int = Field(description=_SEQUENCE)
    response: ResponseObject = Field(description="The response so far.")


class OutputItemEvent(BaseModel):
    """The image, when it is begun and when it is done."""

    type: str = Field(
        description="`response.output_item.added` or `response.output_item.done`.",
        examples=["response.output_item.done"],
    )
    sequence_number: int = Field(description=_SEQUENCE)
    output_index: int = Field(0, description=_INDEX)
    item: ImageCall = Field(description="The image, or what is known of it.")


class ImageCallEvent(BaseModel):
    """A state of the image."""

    type: str = Field(
        description="`response.image_generation_call.in_progress`, "
        "`response.image_generation_call.generating` or "
        "`response.image_generation_call.completed`.",
        examples=["response.image_generation_call.generating"],
    )
    sequence_number: int = Field(description=_SEQUENCE)
    output_index: int = Field(0, description=_INDEX)
    item_id: str = Field(description=_ITEM)


class ImageCallPreviewEvent(BaseModel):
    """A preview of the image."""

    type: Literal["response.image_generation_call.partial_image"] = Field(
        "response.image_generation_call.partial_image", description="Kind of the event."
    )
    sequence_number: int = Field(description=_SEQUENCE)
    output_index: int = Field(0, description=_INDEX)
    item_id: str = Field(description=_ITEM)
    partial_image_index: int = Field(description="Index of the preview, from 0.")
    partial_image_b64: str = Field(description="Preview file, in base64, as large as the image.")
    size: str = Field(description="Size of the preview, as WIDTHxHEIGHT in pixels.")
    quality: Quality = Field(description="Quality of the request; `medium` for `auto`.")
    background: Literal["opaque"] = Field("opaque", description="Always `opaque`.")
    output_format: ImageFormat = Field(description="File format of the preview.")


Event = ResponseEvent | OutputItemEvent | ImageCallEvent | ImageCallPreviewEvent

EVENTS: tuple[type[BaseModel], ...] = (
    ResponseEvent,
    OutputItemEvent,
    ImageCallEvent,
    ImageCallPreviewEvent,
)

EVENT_NAMES = (
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.image_generation_call.in_progress",
    "response.image_generation_call.generating",
    "response.image_generation_call.partial_image",
    "response.image_generation_call.completed",
    "response.output_item.done",
    "response.completed",
    "response.failed",
)
"""Names of events, in their order."""


class Answer:
    """The answer to one request, as events or as their last response. See `EventWriter`."""

    def __init__(
        self, given: ResponsesRequest, translation: Translation, job: ImageJob, model: str
    ) -> None:
        self._numbers = itertools.count()
        self._call = ImageCall(
            id=f"ig_{secrets.token_hex(16)}",
            status="in_progress",
            action=translation.action,
            size=job.size,
            quality=job.body.resolved_quality,
            output_format=job.body.output_format,
        )
        self._response = ResponseObject(
            id=f"resp_{secrets.token_hex(16)}",
            created_at=int(time.time()),
            status="in_progress",
            metadata=given.metadata,
            model=model,
            output=[],
            tool_choice=translation.tool_choice,
            tools=[translation.tool],
            user=given.user,
            safety_identifier=job.body.end_user,
            warnings=list(job.warnings),
        )

    def begin(self) -> Iterable[tuple[str, BaseModel]]:
        yield from self._state("response.created")
        yield from self._state("response.in_progress")
        yield from self._item("response.output_item.added")
        yield from self._progress("in_progress")
        yield from self._progress("generating")

    def write(self, event: ImageEvent) -> Iterable[tuple[str, BaseModel]]:
        match event:
            case PartialImageEvent():
                preview = ImageCallPreviewEvent(
                    sequence_number=next(self._numbers),
                    item_id=self._call.id,
                    partial_image_index=event.partial_image_index,
                    partial_image_b64=event.b64_json,
                    size=event.size,
                    quality=event.quality,
                    output_format=event.output_format,
                )
                yield preview.type, preview
            case CompletedEvent():
                self.complete(event)
                yield from self._progress("completed")
                yield from self._item("response.output_item.done")
                yield from self._state("response.completed")

    def fail(self, error: ErrorDetail) -> Iterable[tuple[str, BaseModel]]:
        self._update("failed")
        self._response.error = ResponseError(code=_code_of(error), message=error.message)
        yield from self._state("response.failed")

    def complete(self, image: CompletedEvent) -> ResponseObject:
        """Add the image, and return the response."""
        self._call = self._call.model_copy(
            update={
                "result": image.b64_json,
                "size": image.size,
                "seed": image.seed,
                "safety": image.safety,
            }
        )
        self._update("completed")
        self._response = self._response.model_copy(
            update={
                "completed_at": image.created_at,
                "tool_usage": ToolUsage(image_gen=image.usage),
                "usage": ModelUsage(),
                "timings": image.timings,
                "warnings": image.warnings,
            }
        )
        return self._response

    def _update(self, status: Status) -> None:
        self._call = self._call.model_copy(update={"status": status})
        self._response = self._response.model_copy(
            update={"status": status, "output": [self._call]}
        )

    def _state(self, name: str) -> Iterable[tuple[str, BaseModel]]:
        number = next(self._numbers)
        yield name, ResponseEvent(type=name, sequence_number=number, response=self._response)

    def _item(self, name: str) -> Iterable[tuple[str, BaseModel]]:
        number = next(self._numbers)
        yield name, OutputItemEvent(type=name, sequence_number=number, item=self._call)

    def _progress(self, state: str) -> Iterable[tuple[str, BaseModel]]:
        name = f"response.{IMAGE_TOOL}_call.{state}"
        number = next(self._numbers)
        yield name, ImageCallEvent(type=name, sequence_number=number, item_id=self._call.id)


def _code_of(
    error: ErrorDetail,
) -> Literal[
    "server_error", "rate_limit_exceeded", "invalid_prompt", "image_content_policy_violation"
]:
    if error.code == "content_policy_violation":
        return "image_content_policy_violation"
    if error.type == "rate_limit_error":
        return "rate_limit_exceeded"
    return "invalid_prompt" if error.type == "invalid_request_error" else "server_error"
