"""Bodies of the image endpoints, as pydantic models."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve_app.errors import InvalidRequest
from serve_app.gateway.openai_fields import REJECTED, hint_warnings
from serve_app.protocol.images import Encoding, ImageFormat
from serve_app.protocol.params import MAX_SEED, AdapterSet, ModelInfo

Quality = Literal["low", "medium", "high"]
"""Quality of a request, once resolved."""


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
        description="Name of the model, from /v1/models. Default: the served model.",
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
    quality: Literal["auto", "low", "medium", "high"] = Field(
        "auto",
        description="Number of denoising steps: 'low' is half of the model's default, 'medium' "
        "and 'auto' the default, 'high' twice the default. /v1/models lists the numbers. "
        "`num_inference_steps` overrides it.",
    )
    response_format: Literal["b64_json"] = Field(
        "b64_json",
        description="Images are part of the response. The server stores no images, so 'url' is "
        "not available.",
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
        None, max_length=512, description="Accepted with a warning: it has no effect."
    )
    user: str | None = Field(
        None, max_length=512, description="Accepted with a warning: it has no effect."
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

    @property
    def resolved_quality(self) -> Quality:
        return "medium" if self.quality == "auto" else self.quality

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
