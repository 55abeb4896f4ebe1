"""Images as files. Encoding is slow next to a denoising step: keep it off the engine's thread."""

import io
from dataclasses import dataclass, field
from typing import Literal, get_args

from PIL import Image

from serve_app.protocol.events import DenoiserCalls, GenerationTimings, Timeline
from serve_app.protocol.safety import SafetyVerdict

ImageFormat = Literal["png", "jpeg", "webp"]
IMAGE_FORMATS: tuple[ImageFormat, ...] = get_args(ImageFormat)

_FULL_COLOR_QUALITY = 90
"""Quality from which JPEG files have colors at full resolution."""


@dataclass(frozen=True)
class Encoding:
    """File format of an image."""

    format: ImageFormat = "png"
    """``"png"``, ``"jpeg"`` or ``"webp"``."""
    quality: int = 95
    """Quality of JPEG and WebP, 0 to 100. PNG is exact."""

    def encode(self, image: Image.Image) -> bytes:
        """Encode an image to the bytes of a file."""
        buffer = io.BytesIO()
        if self.format == "png":
            # Twice as fast as the default, 5 % larger.
            image.save(buffer, "png", compress_level=3)
        elif self.format == "jpeg":
            # Colors at half of the resolution would blur their edges, whatever the quality.
            halved = self.quality < _FULL_COLOR_QUALITY
            image.save(buffer, "jpeg", quality=self.quality, subsampling=2 if halved else 0)
        else:
            image.save(buffer, "webp", quality=self.quality)
        return buffer.getvalue()


@dataclass(frozen=True)
class PartialImage:
    """A preview on its way from a replica to the gateway, as large as the image."""

    index: int
    """Index of the preview, from 0."""
    data: bytes


@dataclass(frozen=True)
class EncodedImage:
    """A finished image on its way from a replica to the gateway."""

    data: bytes
    seed: int
    width: int
    height: int
    warnings: tuple[str, ...] = ()
    prompt_tokens: int = 0
    timings: GenerationTimings = field(default_factory=GenerationTimings)
    timeline: Timeline | None = None
    """Timeline of a traced request."""
    age_s: float = 0.0
    """Seconds since the submission when it left the replica."""
    safety: SafetyVerdict | None = None
    """Verdict of the safety checker; ``None`` if nothing looked at the image."""
    calls: DenoiserCalls = field(default_factory=DenoiserCalls)
