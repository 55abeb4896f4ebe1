"""Responses and events of the HTTP API, as pydantic models."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, Field

from serve_app.config.gateway import Safety
from serve_app.config.speed import Acceleration
from serve_app.gateway.image_request import Quality
from serve_app.protocol.backend import ModelState
from serve_app.protocol.events import GENERATION_PARTS, DenoiserCalls
from serve_app.protocol.images import ImageFormat
from serve_app.protocol.params import Task
from serve_app.protocol.safety import SafetyVerdict

RESPONSE = "response"
"""The last part of a request: from the pixels to the last byte of the answer."""

PARTS = (*GENERATION_PARTS, RESPONSE)
"""Parts of a request's time, in their order."""

# Descriptions of fields that responses and events share.
_SIZE = "Size of the image, as WIDTHxHEIGHT in pixels."
_OUTPUT_FORMAT = "File format of the image."
_QUALITY = "Quality of the request; `medium` for `auto`."
_BACKGROUND = "Always `opaque`."
_CREATED_AT = "Unix time of the event, in seconds."
_USAGE = "Tokens of the request."
_TIMINGS = "Duration of each part of the request."
_WARNINGS = (
    "Parts of the request without effect, such as a field or the end of a long prompt, and images "
    "that the safety checker flagged."
)
_DATA = "Images, in the order of their seeds."
_SAFETY = "Verdict of the safety checker. Null if nothing looked at the image."
_END_USER = "The request's `safety_identifier`, or else its `user`."


class ImageSafety(BaseModel):
    """The verdict of the safety checker on one image."""

    flagged: bool = Field(description="True if the image may be unsafe.")

    @classmethod
    def of(cls, verdict: SafetyVerdict | None) -> "ImageSafety | None":
        """Describe a verdict; ``None`` if there is none."""
        return None if verdict is None else cls(flagged=verdict.flagged)


class ImageData(BaseModel):
    """One image."""

    b64_json: str = Field(description="Image file, in base64.")
    seed: int = Field(description="Seed that generates this image again.")
    safety: ImageSafety | None = Field(description=_SAFETY)


class ImageLink(BaseModel):
    """One image, by a link to its file."""

    url: str = Field(description="Link to the image file. It expires, and needs no key.")
    seed: int = Field(description="Seed that generates this image again.")
    safety: ImageSafety | None = Field(description=_SAFETY)


class InputTokensDetails(BaseModel):
    """Tokens that the model read."""

    text_tokens: int = Field(
        description="Tokens of the prompt, counted for each image; 0 for an unknown tokenizer."
    )
    image_tokens: int = Field(
        description="Squares of 16 x 16 pixels of the input images, counted for each generated "
        "image. The first one counts at the generated size, the others as the model reads them."
    )


class OutputTokensDetails(BaseModel):
    """Tokens that the model generated."""

    text_tokens: int = Field(0, description="Always 0.")
    image_tokens: int = Field(description="Image tokens of the generated images.")


class Usage(BaseModel):
    """Tokens of a request. An image counts one token for each square of 16 x 16 pixels."""

    input_tokens: int = Field(description="Text tokens and image tokens together.")
    input_tokens_details: InputTokensDetails = Field(description="Input tokens by kind.")
    output_tokens: int = Field(description="Image tokens of the generated images.")
    output_tokens_details: OutputTokensDetails = Field(description="Output tokens by kind.")
    total_tokens: int = Field(description="Input tokens and output tokens together.")


class Timings(BaseModel):
    """Durations of the parts of a request, in seconds. The parts add up to the total.

    For several images (`n`), these are the parts of the image that ended last.
    """

    queue_s: float = Field(
        description="From arrival to start, with the transfers between gateway and replica."
    )
    encode_s: float = Field(description="From start to first step: text encoding.")
    denoise_s: float = Field(description="Denoising steps, with the waits between them.")
    decode_s: float = Field(description="Decoding, from latents to pixels.")
    response_s: float = Field(description="Encoding of the file, and its transfer.")
    total_s: float = Field(description="From arrival to this response.")
    denoiser_calls: int = Field(0, description="Denoiser calls that were made.")
    extrapolated_calls: int = Field(
        0, description="Denoiser calls that were extrapolated from earlier ones."
    )

    @classmethod
    def of(cls, parts_s: Sequence[float], calls: DenoiserCalls) -> "Timings":
        """Make timings from durations in the order of `PARTS`."""
        named = {f"{part}_s": took_s for part, took_s in zip(PARTS, parts_s, strict=True)}
        return cls(
            **named,
            total_s=sum(parts_s),
            denoiser_calls=calls.made,
            extrapolated_calls=calls.extrapolated,
        )

    def until(self, total_s: float) -> "Timings":
        """Extend the response part, so that the total is ``total_s`` after the arrival."""
        response_s = max(0.0, self.response_s + total_s - self.total_s)
        return self.model_copy(update={"response_s": response_s, "total_s": total_s})

    def parts(self) -> dict[str, float]:
        """Return the durations by their names in metrics and logs."""
        return {part: getattr(self, f"{part}_s") for part in PARTS}


class ImagesAnswer(BaseModel):
    """What the responses of the image endpoints have in common."""

    created: int = Field(description="Unix time of the response, in seconds.")
    data: Sequence[ImageData | ImageLink] = Field(description=_DATA)
    size: str = Field(description=_SIZE)
    output_format: ImageFormat = Field(description=_OUTPUT_FORMAT)
    quality: Quality = Field(description=_QUALITY)
    background: Literal["opaque"] = Field("opaque", description=_BACKGROUND)
    usage: Usage = Field(description=_USAGE)
    safety_identifier: str | None = Field(description=_END_USER)
    timings: Timings = Field(description=_TIMINGS)
    warnings: list[str] = Field(description=_WARNINGS)


class ImagesResponse(ImagesAnswer):
    """The response of the image endpoints without ``stream``."""

    data: Sequence[ImageData] = Field(description=_DATA)


class LinksResponse(ImagesAnswer):
    """The response of the image endpoints with ``response_format: url``."""

    data: Sequence[ImageLink] = Field(description=_DATA)


ImageOperation = Literal["image_generation", "image_edit"]
"""Prefix of event types."""


class PartialImageEvent(BaseModel):
    """A preview of the image."""

    type: str = Field(
        description="`image_generation.partial_image` or `image_edit.partial_image`.",
        examples=["image_generation.partial_image", "image_edit.partial_image"],
    )
    partial_image_index: int = Field(description="Index of the preview, from 0.")
    b64_json: str = Field(description="Preview file, in base64, as large as the image.")
    created_at: int = Field(description=_CREATED_AT)
    size: str = Field(description=_SIZE)
    quality: Quality = Field(description=_QUALITY)
    background: Literal["opaque"] = Field("opaque", description=_BACKGROUND)
    output_format: ImageFormat = Field(description=_OUTPUT_FORMAT)


class CompletedEvent(BaseModel):
    """The finished image. This is the last event."""

    type: str = Field(
        description="`image_generation.completed` or `image_edit.completed`.",
        examples=["image_generation.completed", "image_edit.completed"],
    )
    b64_json: str = Field(description="Image file, in base64.")
    created_at: int = Field(description=_CREATED_AT)
    size: str = Field(description=_SIZE)
    quality: Quality = Field(description=_QUALITY)
    background: Literal["opaque"] = Field("opaque", description=_BACKGROUND)
    output_format: ImageFormat = Field(description=_OUTPUT_FORMAT)
    usage: Usage = Field(description=_USAGE)
    safety_identifier: str | None = Field(description=_END_USER)
    seed: int = Field(description="Seed that generates this image again.")
    safety: ImageSafety | None = Field(description=_SAFETY)
    timings: Timings = Field(description=_TIMINGS)
    warnings: list[str] = Field(description=_WARNINGS)


class ProgressEvent(BaseModel):
    """The progress of the image, for requests with ``progress: true``."""

    type: str = Field(
        description="`image_generation.progress` or `image_edit.progress`.",
        examples=["image_generation.progress", "image_edit.progress"],
    )
    step: int = Field(description="Denoising steps that are done.")
    total_steps: int = Field(description="Denoising steps that run in all.")
    queue_position: int | None = Field(
        description="Number of requests that wait before this one. Null once it runs."
    )
    eta_s: float = Field(description="Predicted seconds until the image is done.")


class ModelSummary(BaseModel):
    """A model by its configuration: OpenAI's fields, its state, and its limits."""

    id: str = Field(description="Name of the model in requests.")
    object: Literal["model"] = Field("model", description="Always `model`.")
    created: int = Field(description="Unix time of the gateway's start, in seconds.")
    owned_by: str = Field("diffusion-serve", description="Always `diffusion-serve`.")
    state: ModelState = Field(
        description="`running`: a replica can generate. `starting`: none can yet. `at_zero`: there "
        "is no replica, and a request starts one. `failed`: the last start failed. `unknown`: Ray "
        "Serve has not reported the replicas to this gateway yet."
    )
    max_pixels: int = Field(description="Largest width times height.")
    max_side: int = Field(description="Largest width and height, in pixels.")
    max_steps: int = Field(description="Largest `num_inference_steps`.")
    max_images: int = Field(description="Largest `n`.")
    max_prompt_chars: int = Field(description="Longest prompt, in characters.")
    max_deadline_s: float = Field(description="Longest `deadline_s`.")
    max_loras: int = Field(description="Most LoRA adapters of one request.")


class ModelObject(ModelSummary):
    """A model that a replica has loaded: OpenAI's fields, then its options and limits."""

    pipeline: str = Field(description="Class of the diffusers pipeline.")
    tasks: list[str] = Field(description="`text-to-image`, `image-to-image`, `inpainting`.")
    default_size: str = Field(description="Size of requests that set none, as WIDTHxHEIGHT.")
    size_multiple: int = Field(description="Width and height must be multiples of it.")
    default_steps: int = Field(description="Denoising steps of requests that set none.")
    default_acceleration: Acceleration = Field(
        description="`acceleration` of requests that set none."
    )
    low_quality_acceleration: Acceleration = Field(
        description="`acceleration` of requests of `quality: low` that set neither it nor "
        "`num_inference_steps`; `none` if they make fewer steps instead."
    )
    quality_steps: dict[Quality, int] = Field(description="Denoising steps of each `quality`.")
    max_input_images: int = Field(description="Most input images of an edit; 0 without edits.")
    default_strengths: dict[Task, float] = Field(
        description="`strength` of requests that set none, for each task that takes one."
    )
    takes_negative_prompt: bool = Field(description="True if the model supports `negative_prompt`.")
    schedulers: list[str] = Field(
        description="Noise schedulers for `scheduler`, in at least one task."
    )
    unavailable_schedulers: dict[str, dict[Task, str]] = Field(
        description="Noise schedulers that failed their trial: the reason for each task in which "
        "they are not offered. `default` is the model's own."
    )
    loras: list[str] = Field(description="LoRA adapters for `lora` that the start loaded.")
    partial_loras: dict[str, str] = Field(description="Adapters that fit in part: the used share.")
    loras_on_demand: bool = Field(
        description="True if `lora` may name others, which `GET /v1/loras` lists."
    )
    safety: Safety = Field(
        description="Treatment of images that the safety checker flags: `flag` names them in the "
        "response, `block` fails the request, `off` checks none."
    )
    safety_checker: bool = Field(description="True if a safety checker looks at every image.")
    batching: Literal["on", "off"] = Field(
        description="`on` if requests share denoiser calls, as certified at start-up."
    )
    batching_difference: float | None = Field(
        description="Largest pixel difference, in [0, 1], between batched and sequential "
        "generation at start-up. Null if it was not measured. It decides nothing: in bfloat16 and "
        "float16, rounding alone makes it visible."
    )
    batching_psnr_db: float | None = Field(
        description="Peak signal-to-noise ratio of the same images, in decibels; 200 if they are "
        "equal. Null if it was not measured."
    )
    batching_note: str = Field(
        description="Reason why batching is off, or limit to batches: only prompts of the same "
        "length share calls. Empty if all requests for a size may share them."
    )


class ModelList(BaseModel):
    """The response of ``GET /v1/models``."""

    object: Literal["list"] = Field("list", description="Always `list`.")
    data: list[ModelObject] = Field(description="The served model.")


class SeveralModels(BaseModel):
    """The response of ``GET /v1/models`` of a server with several models."""

    object: Literal["list"] = Field("list", description="Always `list`.")
    data: list[ModelObject | ModelSummary] = Field(
        description="The models, the default one first. A model that no replica has loaded yet has "
        "only the fields of its configuration."
    )


class LoraObject(BaseModel):
    """A LoRA adapter that requests may name."""

    id: str = Field(description="Name of the adapter, for `lora`.")
    object: Literal["lora"] = Field("lora", description="Always `lora`.")
    model: str = Field(description="Name of the model that it changes.")
    on_demand: bool = Field(
        description="True if a request loads it; false if the start of a replica does."
    )
    replicas: int = Field(description="Number of running replicas that have it in memory.")


class LoraObjects(BaseModel):
    """The response of ``GET /v1/loras``."""

    object: Literal["list"] = Field("list", description="Always `list`.")
    data: list[LoraObject] = Field(description="The adapters of all models that are running.")


class Health(BaseModel):
    """The response of ``GET /health`` and ``GET /ready`` with status 200."""

    status: Literal["ok"] = Field("ok", description="Always `ok`.")


class ErrorDetail(BaseModel):
    """The message, kind and field of an error."""

    message: str = Field(description="The problem, and the allowed values.")
    type: str = Field(description="Kind of the error, as in OpenAI's API.")
    param: str | None = Field(description="Field of the request that is wrong, or null.")
    code: str | None = Field(description="Code of the error, for programs.")


class ErrorResponse(BaseModel):
    """The body of every error, as in OpenAI's API."""

    error: ErrorDetail = Field(description="The error.")
