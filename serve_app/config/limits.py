"""The settings that bound a request."""

from pydantic import Field

from serve_app.config.section import Section


class LimitsConfig(Section):
    """The most that one request may use."""

    max_pixels: int = Field(2048 * 2048, ge=64, description="Width times height of one image.")
    max_side_px: int = Field(
        4096,
        ge=8,
        description="Width or height of one image, in pixels. Position embeddings limit the side "
        "that a model supports.",
    )
    max_image_pixels: int = Field(
        16 * 1024 * 1024,
        ge=64,
        description="Width times height of an input image. The gateway needs 8 bytes for each of "
        "its pixels while it reads the image.",
    )
    max_input_images: int = Field(
        4,
        ge=1,
        le=16,
        description="Input images of one request, for models that take several. The start tries "
        "this number, so the memory must be enough for it.",
    )
    max_steps: int = Field(100, ge=1, description="Denoising steps of one image.")
    max_images: int = Field(10, ge=1, description="Images of one HTTP request (`n`).")
    max_loras: int = Field(4, ge=0, description="LoRA adapters of one image.")
    max_prompt_chars: int = Field(
        4_000, ge=1, description="Characters of a prompt or a negative prompt."
    )
    max_body_bytes: int = Field(1024 * 1024, ge=1024, description="Bytes of a JSON body.")
    max_upload_bytes: int = Field(
        32 * 1024 * 1024, ge=1024, description="Bytes of a body with an input image."
    )
    max_deadline_s: float = Field(
        600.0,
        gt=0,
        description="Longest deadline that a request may set, in seconds. A request that is not "
        "done this long after a replica admitted it is cancelled and ends with status 504.",
    )
