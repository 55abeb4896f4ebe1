"""Requests and responses of the HTTP API, as pydantic models."""

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from serve_app.engine.encoding import ImageFormat
from serve_app.engine.params import AdapterSet
from serve_app.errors import InvalidRequest


class ImageGenerationRequest(BaseModel):
    """Body of ``POST /v1/images/generations``: OpenAI's fields, then our extensions.

    Types are checked here; ranges, which depend on the model and the limits, in
    `GenerationParams.resolved`.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str = Field(description="What the picture shows.", examples=["a red circle on blue"])
    model: str | None = Field(None, description="A name from /v1/models; may be left out.")
    n: int = Field(1, description="How many pictures; each has a seed of its own.")
    size: str | None = Field(
        None, description="WIDTHxHEIGHT in pixels, or 'auto'.", examples=["64x64"]
    )
    response_format: Literal["b64_json"] = "b64_json"
    output_format: ImageFormat = "png"

    negative_prompt: str | None = Field(None, description="What the picture must not show.")
    num_inference_steps: int | None = Field(None, description="Denoising steps.")
    guidance_scale: float | None = Field(None, description="How closely it follows, 0 to 100.")
    scheduler: str | None = Field(
        None, description="Noise scheduler, by a name from /v1/models. Default: the model's own."
    )
    lora: dict[str, float] | str | None = Field(
        None,
        description="LoRA adapters by names from /v1/models, each with its scale; or one name.",
        examples=[{"pixel-art": 0.8}],
    )
    seed: int | None = Field(None, description="Same seed, same picture. Default: drawn.")

    def adapters(self) -> AdapterSet:
        if isinstance(self.lora, str):
            return ((self.lora, 1.0),)
        return tuple((self.lora or {}).items())

    def size_px(self) -> tuple[int | None, int | None]:
        """(width, height), or two ``None`` for the model's default. Raises `InvalidRequest`."""
        if self.size is None or self.size == "auto":
            return None, None
        match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", self.size)
        if match is None:
            raise InvalidRequest(
                f"size must be WIDTHxHEIGHT in pixels, such as 512x512, or 'auto'; got "
                f"{self.size[:40]!r}.",
                "size",
            )
        return int(match[1]), int(match[2])


class ImageData(BaseModel):
    """One picture."""

    b64_json: str
    seed: int = Field(description="The seed that paints this picture again.")


class ImagesResponse(BaseModel):
    """Answer to ``POST /v1/images/generations``."""

    created: int = Field(description="Unix time in seconds.")
    data: list[ImageData]
    size: str
    output_format: ImageFormat
    warnings: list[str] = Field(description="What of the request had no effect.")


class ModelObject(BaseModel):
    """A model in ``GET /v1/models``: OpenAI's fields, then what it takes."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "diffusion-serve"
    pipeline: str
    default_size: str
    size_multiple: int = Field(description="Width and height must be multiples of it.")
    default_steps: int
    max_steps: int
    schedulers: list[str] = Field(description="Noise schedulers that a request may name.")
    loras: list[str] = Field(description="LoRA adapters that a request may name.")
    max_pixels: int
    batching: Literal["on", "off"]
    batching_difference: float | None = Field(
        description="Largest difference between batched and alone at start-up, pixels in [0, 1]."
    )
    batching_note: str = Field(description="Why batching is off.")


class ModelList(BaseModel):
    """Answer to ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class Health(BaseModel):
    """Answer to ``GET /health`` when a replica is ready."""

    status: Literal["ok"] = "ok"


class ErrorDetail(BaseModel):
    """What was wrong, where, and of which kind."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every error, in OpenAI's shape."""

    error: ErrorDetail
