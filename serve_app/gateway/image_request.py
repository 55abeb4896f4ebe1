"""Bodies of the image endpoints, as pydantic models."""

from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve_app.config.speed import Acceleration
from serve_app.errors import InvalidRequest
from serve_app.gateway.openai_fields import REJECTED, hint_warnings
from serve_app.protocol.images import Encoding, ImageFormat
from serve_app.protocol.params import MAX_SEED, AdapterSet, ModelInfo

Quality = Literal["low", "medium", "high", "xhigh", "max"]
"""Quality of a request, once resolved."""

MOST_INPUT_IMAGES = 16
"""Input images of an edit in OpenAI's API. Models take fewer."""

_QUALITIES: dict[str, Quality] = {"auto": "medium", "standard": "medium", "hd": "high"}
"""Other names of qualities; the last two are those of OpenAI's earlier models."""


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
        None,
        description="Name of the model, from /v1/models, or one of the server's aliases. Default: "
        "the first model.",
        examples=["demo"],
    )
    n: int = Field(
        1,
        ge=1,
        description="Number of images. Image k, counted from 0, has the seed `seed` + k.",
        examples=[1],
    )
    size: str | None = Field(
        None,
        pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$",
        description="WIDTHxHEIGHT in pixels, both multiples of the model's `size_multiple`, or "
        "'auto'. 'auto' is the model's default size. For edits it is the size of the input image, "
        "reduced to at most the number of pixels of the model's default size.",
        examples=["64x64"],
    )
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] = Field(
        "auto",
        description="Number of denoising steps: 'low' is half of the model's default, or, where "
        "the server is configured so, all of them with `acceleration`. 'medium', "
        "'standard' and 'auto' are the default. 'high' and 'hd' are twice the default, 'xhigh' "
        "three times, 'max' four times. /v1/models lists the numbers, which keep to the limits. "
        "`num_inference_steps` overrides it.",
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        None,
        description="'b64_json': images are part of the response. 'url': the response has links "
        "to them, which expire. Needs a server that stores images, and no `stream`. Default: "
        "'b64_json', unless the server's operator has chosen 'url'.",
        examples=["b64_json"],
    )
    output_format: ImageFormat = Field("png", description="File format of the images.")
    output_compression: int | None = Field(
        None,
        ge=0,
        le=100,
        description="Quality of JPEG and WebP. Default: 95. PNG is lossless, and accepts only 100.",
    )
    background: Literal["auto", "opaque"] = Field(
        "auto", description="Background of the images, which is always opaque."
    )
    complexity: Literal["low", "medium", "high"] | None = Field(
        None, description="Accepted with a warning: it has no effect."
    )
    moderation: Literal["auto", "low"] = Field(
        "auto", description="'low' is accepted with a warning: it has no effect."
    )
    safety_identifier: str | None = Field(
        None,
        max_length=512,
        description="Name of the end user, for the server's log. The response repeats it.",
    )
    user: str | None = Field(
        None, max_length=512, description="The same, for requests without `safety_identifier`."
    )
    stream: bool = Field(False, description="Respond with server-sent events.")
    partial_images: int = Field(
        0,
        ge=0,
        le=3,
        description="Number of previews to send during generation. Needs `stream`. A request with "
        "few steps has fewer.",
    )

    negative_prompt: str | None = Field(
        None,
        description="Description of content to avoid. It has no effect at a guidance scale of 1 "
        "or less.",
        examples=["a square"],
    )
    num_inference_steps: int | None = Field(
        None,
        ge=1,
        description="Number of denoising steps. Default: from `quality`.",
        examples=[8],
    )
    guidance_scale: float | None = Field(
        None,
        ge=0,
        le=100,
        description="Weight of the prompt: a higher value follows it more closely. Default: the "
        "model's.",
        examples=[4.0],
    )
    seed: int | None = Field(
        None,
        ge=0,
        le=MAX_SEED,
        description="Seed of the random numbers: the same seed gives the same image. Default: "
        "random. The response contains it.",
        examples=[7],
    )
    scheduler: str | None = Field(
        None, description="Noise scheduler, a name from /v1/models. Default: the model's own."
    )
    acceleration: Acceleration | None = Field(
        None,
        description="Share of the denoiser calls that are extrapolated from earlier ones. 'none' "
        "makes every call. On the demo in 30 steps, 'balanced' saves nearly half, 'fast' more. "
        "Default: the server's.",
        examples=["balanced"],
    )
    lora: dict[str, float] | str | None = Field(
        None,
        description="LoRA adapters: names from /v1/models with scales, or one name (scale 1).",
        examples=[None],
    )
    deadline_s: float | None = Field(
        None,
        gt=0,
        description="Deadline in seconds. A request that would miss it is rejected with status 429 "
        "and a time to retry. An admitted request that becomes late is still completed. Without "
        "a deadline, `engine.slo_scale` times the image's time on an idle replica orders the "
        "requests, and none is rejected for being late.",
        examples=[30.0],
    )
    progress: bool = Field(
        False, description="Also send events with the progress of the image. Needs `stream`."
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, body: Any) -> Any:
        """Drop null values: in OpenAI's schema and its clients' types, null means the default."""
        if not isinstance(body, dict):
            return body
        optional = (cls.model_fields.keys() | REJECTED.keys()) - {"prompt"}
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

    def level(self, model: ModelInfo) -> Acceleration | None:
        """Return the acceleration that the request names or its quality implies."""
        if self.acceleration is None and self.num_inference_steps is None:
            implied = model.low_quality_acceleration
            if self.resolved_quality == "low" and implied != "none":
                return implied
        return self.acceleration

    @property
    def resolved_quality(self) -> Quality:
        return cast(Quality, _QUALITIES.get(self.quality, self.quality))

    @property
    def end_user(self) -> str | None:
        """The name of the end user; ``None`` without one. Empty names count as left out."""
        return self.safety_identifier or self.user or None

    def encoding(self) -> Encoding:
        if self.output_compression is None:
            return Encoding(self.output_format)
        return Encoding(self.output_format, self.output_compression)

    def warnings(self) -> list[str]:
        """Name the fields that have no effect."""
        return hint_warnings(dict(self))

    def check(self) -> None:
        """Raise `InvalidRequest` for fields that do not go together."""
        if self.output_format == "png" and self.output_compression not in (None, 100):
            raise InvalidRequest(
                f"output_compression is {self.output_compression}, for jpeg and webp only; leave "
                "it out for png, which is exact.",
                "output_compression",
            )
        if self.stream and self.n > 1:
            raise InvalidRequest("a stream carries one image: n must be 1.", "n")
        for name in ("partial_images", "progress"):
            if getattr(self, name) and not self.stream:
                raise InvalidRequest(f"{name} needs stream: true.", name)


class ImageGenerationRequest(ImageRequest):
    """The body of ``POST /v1/images/generations``."""

    style: Literal["vivid", "natural"] | None = Field(
        None,
        description="Accepted with a warning: it has no effect. Describe the style in the prompt.",
    )


class ImageEditRequest(ImageRequest):
    """The fields of ``POST /v1/images/edits`` beside its images."""

    input_fidelity: Literal["low", "high"] | None = Field(
        None,
        description="Accepted with a warning: it has no effect. `strength` sets how much changes.",
    )
    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the input image that may change. The same share of the steps runs. "
        "Default: the model's.",
        examples=[0.6],
    )


class ImageReference(BaseModel):
    """An input image in a JSON body."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image_url: str = Field(
        description="File as a data URL with base64. Other URLs are not fetched.",
        json_schema_extra={"format": "uri"},
    )

    @model_validator(mode="before")
    @classmethod
    def _has_no_file_id(cls, reference: Any) -> Any:
        if not isinstance(reference, dict):
            return reference
        if reference.get("file_id") is not None:
            raise InvalidRequest(
                "file_id: this server stores no files; send the image as image_url, a data URL.",
                "file_id",
            )
        return {name: value for name, value in reference.items() if value is not None}


class JsonEditRequest(ImageEditRequest):
    """The JSON body of ``POST /v1/images/edits``."""

    images: list[ImageReference] = Field(
        min_length=1,
        max_length=MOST_INPUT_IMAGES,
        description="Input images, as objects with `image_url`: a data URL. /v1/models has the "
        "number that the model takes.",
    )
    mask: ImageReference | None = Field(
        None, description="Mask, as an object with `image_url`: a data URL."
    )

    def without_images(self) -> ImageEditRequest:
        """Return the other fields, as a form has them."""
        return ImageEditRequest.model_validate(self.model_dump(exclude={"images", "mask"}))
