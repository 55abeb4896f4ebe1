"""Requests, responses and events of the HTTP API, as pydantic models."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve_app.errors import InvalidRequest
from serve_app.protocol.events import GENERATION_PARTS
from serve_app.protocol.images import Encoding, ImageFormat
from serve_app.protocol.params import MAX_SEED, AdapterSet, ModelInfo

Quality = Literal["low", "medium", "high"]

RESPONSE = "response"
"""The last part of a request: from the pixels to the last byte of the answer."""

PARTS = (*GENERATION_PARTS, RESPONSE)
"""Parts of a request's time, in their order."""


class ImageRequest(BaseModel):
    """Fields of all image endpoints: OpenAI's, then this server's extensions.

    Types and fixed ranges are checked here. `GenerationParams.resolved` checks values that depend
    on the model and the configured limits.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str = Field(
        description="Description of the image.", examples=["a red circle on a blue background"]
    )
    model: str | None = Field(
        None, description="A name from /v1/models; may be left out.", examples=["demo"]
    )
    n: int = Field(
        1, ge=1, description="Number of images; the k-th has the seed `seed` + k.", examples=[1]
    )
    size: str | None = Field(
        None,
        pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$",
        description="WIDTHxHEIGHT in pixels, in multiples of the model's `size_multiple`; or "
        "'auto': the model's own, and for edits that of the input image, made smaller where it "
        "has more pixels than the model's own.",
        examples=["64x64"],
    )
    quality: Literal["auto", "low", "medium", "high"] = Field(
        "auto",
        description="Denoising steps in a word, as /v1/models lists them: half as many as the "
        "model's default, as many (auto, too), twice as many. `num_inference_steps` overrides it.",
    )
    response_format: Literal["b64_json"] = Field(
        "b64_json",
        description="Images are part of the answer; there are no URLs, because none is stored.",
    )
    output_format: ImageFormat = Field("png", description="Kind of file.")
    output_compression: int | None = Field(
        None,
        ge=0,
        le=100,
        description="Quality of JPEG and WebP, 95 by default. Not for PNG, which is exact.",
    )
    background: Literal["auto", "opaque"] = Field(
        "auto", description="Images are opaque: the models have no transparency."
    )
    user: str | None = Field(
        None, max_length=512, description="Accepted for compatibility; it has no effect."
    )
    stream: bool = Field(False, description="Answer with server-sent events.")
    partial_images: int = Field(
        0,
        ge=0,
        le=3,
        description="Previews to send during generation, with `stream`; fewer if there are "
        "fewer steps.",
    )

    negative_prompt: str | None = Field(
        None, description="Description of what the image must not show.", examples=["a square"]
    )
    num_inference_steps: int | None = Field(
        None, ge=1, description="Denoising steps. Default: the model's.", examples=[8]
    )
    guidance_scale: float | None = Field(
        None,
        ge=0,
        le=100,
        description="How closely the image follows the prompt.",
        examples=[4.0],
    )
    seed: int | None = Field(
        None,
        ge=0,
        le=MAX_SEED,
        description="The same seed gives the same image. Default: random; the answer has it.",
        examples=[7],
    )
    scheduler: str | None = Field(
        None, description="Noise scheduler, by a name from /v1/models. Default: the model's own."
    )
    lora: dict[str, float] | str | None = Field(
        None,
        description="LoRA adapters by names from /v1/models, each with its scale; or one name.",
        examples=[None],
    )
    deadline_s: float | None = Field(
        None,
        gt=0,
        description="Seconds in which the image must be done. A request that would miss it is "
        "rejected with 429 and the time for a retry; one that was admitted and is late is still "
        "completed. Without it, a multiple of the image's time on an idle replica sets the order "
        "of requests, and none is rejected for being late.",
        examples=[30.0],
    )
    progress: bool = Field(
        False, description="With `stream`: also send the image's progress and remaining time."
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, body: Any) -> Any:
        """Drop null values: in OpenAI's schema and its clients' types, null means the default."""
        if not isinstance(body, dict):
            return body
        optional = cls.model_fields.keys() - {"prompt"}
        return {
            name: value for name, value in body.items() if value is not None or name not in optional
        }

    def adapters(self) -> AdapterSet:
        if isinstance(self.lora, str):
            return ((self.lora, 1.0),)
        return tuple((self.lora or {}).items())

    def size_px(self) -> tuple[int | None, int | None]:
        """Return (width, height), or two ``None`` for the default."""
        if self.size is None or self.size == "auto":
            return None, None
        width, height = self.size.split("x")
        return int(width), int(height)

    def steps(self, model: ModelInfo) -> int:
        if self.num_inference_steps is not None:
            return self.num_inference_steps
        return model.quality_steps[self.resolved_quality]

    @property
    def resolved_quality(self) -> Quality:
        return "medium" if self.quality == "auto" else self.quality

    def encoding(self) -> Encoding:
        if self.output_compression is None:
            return Encoding(self.output_format)
        return Encoding(self.output_format, self.output_compression)

    def check(self) -> None:
        """Raise `InvalidRequest` for fields that do not go together."""
        if self.output_compression is not None and self.output_format == "png":
            raise InvalidRequest(
                "output_compression is for jpeg and webp; leave it out for png, which is exact.",
                "output_compression",
            )
        if self.stream and self.n > 1:
            raise InvalidRequest("a stream carries one image: n must be 1.", "n")
        for name in ("partial_images", "progress"):
            if getattr(self, name) and not self.stream:
                raise InvalidRequest(f"{name} needs stream: true.", name)


class ImageGenerationRequest(ImageRequest):
    """Body of ``POST /v1/images/generations``."""


class ImageEditRequest(ImageRequest):
    """The fields of ``POST /v1/images/edits`` beside its images."""

    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        description="How much of the image may change, also the share of the steps that run. "
        "Default: the model's.",
        examples=[0.6],
    )


class ImageData(BaseModel):
    """One image."""

    b64_json: str = Field(description="The file, in base64.")
    seed: int = Field(description="The seed that generates this image again.")


class InputTokensDetails(BaseModel):
    """Tokens that the model read."""

    text_tokens: int = Field(
        description="Tokens of the prompt, once for each image; 0 if the tokenizer is unknown."
    )
    image_tokens: int = Field(
        description="Squares of 16 x 16 pixels of the input image, scaled to the size that is "
        "generated; once for each generated image."
    )


class Usage(BaseModel):
    """Work in OpenAI's terms. An image counts one token for 16 x 16 pixels."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    total_tokens: int


class Timings(BaseModel):
    """Seconds of each part, which add up to the total. Several images have the last one's."""

    queue_s: float = Field(
        description="From the request's arrival to its start, and the way back from the replica."
    )
    encode_s: float = Field(description="From there to its first step: text encoding.")
    denoise_s: float = Field(description="The steps, with waits in between.")
    decode_s: float = Field(description="From latents to pixels.")
    response_s: float = Field(description="From there to this answer: the file, and its way.")
    total_s: float = Field(description="From the request's arrival to this answer.")

    @classmethod
    def of(cls, parts_s: Sequence[float]) -> "Timings":
        """Make timings from durations in the order of `PARTS`."""
        named = {f"{part}_s": took_s for part, took_s in zip(PARTS, parts_s, strict=True)}
        return cls(**named, total_s=sum(parts_s))

    def until(self, total_s: float) -> "Timings":
        """Extend the response part, so that the total is ``total_s`` after the arrival."""
        response_s = max(0.0, self.response_s + total_s - self.total_s)
        return self.model_copy(update={"response_s": response_s, "total_s": total_s})

    def parts(self) -> dict[str, float]:
        """Return the durations by their names in metrics and logs."""
        return {part: getattr(self, f"{part}_s") for part in PARTS}


class ImagesResponse(BaseModel):
    """Answer of the image endpoints without ``stream``."""

    created: int = Field(description="Unix time in seconds.")
    data: list[ImageData]
    size: str
    output_format: ImageFormat
    quality: Quality
    background: Literal["opaque"] = "opaque"
    usage: Usage
    timings: Timings
    warnings: list[str] = Field(description="Parts of the request without effect.")


ImageOperation = Literal["image_generation", "image_edit"]
"""Prefix of event types."""


class PartialImageEvent(BaseModel):
    """A preview."""

    type: str = Field(examples=["image_generation.partial_image", "image_edit.partial_image"])
    partial_image_index: int
    b64_json: str
    created_at: int
    size: str
    quality: Quality
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat


class CompletedEvent(BaseModel):
    """The finished image; the last event."""

    type: str = Field(examples=["image_generation.completed", "image_edit.completed"])
    b64_json: str
    created_at: int
    size: str
    quality: Quality
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat
    usage: Usage
    seed: int
    timings: Timings
    warnings: list[str]


class ProgressEvent(BaseModel):
    """The image's progress, for requests with ``progress: true``."""

    type: str = Field(examples=["image_generation.progress", "image_edit.progress"])
    step: int = Field(description="Denoising steps that are done.")
    total_steps: int
    queue_position: int | None = Field(
        description="Requests that wait before it; null once it is being generated."
    )
    eta_s: float = Field(description="Seconds until the image should be done.")


class ModelObject(BaseModel):
    """One model in ``GET /v1/models``: OpenAI's fields, then its options."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "diffusion-serve"
    pipeline: str = Field(description="Class of the diffusers pipeline.")
    tasks: list[str]
    default_size: str
    size_multiple: int = Field(description="Width and height must be multiples of it.")
    max_pixels: int = Field(description="Largest width times height.")
    max_side: int = Field(description="Largest width and height, in pixels.")
    default_steps: int
    max_steps: int
    quality_steps: dict[Quality, int] = Field(description="Steps for each `quality`.")
    max_images: int = Field(description="Largest `n`.")
    max_prompt_chars: int
    max_deadline_s: float
    takes_negative_prompt: bool
    schedulers: list[str] = Field(description="Noise schedulers that a request may name.")
    loras: list[str] = Field(description="LoRA adapters that a request may name.")
    max_loras: int = Field(description="LoRA adapters of one request.")
    batching: Literal["on", "off"]
    batching_difference: float | None = Field(
        description="Largest difference between batched and sequential at start-up, in [0, 1] "
        "pixels."
    )
    batching_note: str = Field(description="Why batching is off.")


class ModelList(BaseModel):
    """Answer to ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class Health(BaseModel):
    """Answer to ``GET /health`` and ``GET /ready`` when all is well."""

    status: Literal["ok"] = "ok"


class ErrorDetail(BaseModel):
    """The message, kind and field of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every error, in OpenAI's shape."""

    error: ErrorDetail
