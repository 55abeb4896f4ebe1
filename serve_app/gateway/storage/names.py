"""Names of stored images: an expiry, a secret and a format.

A name is all that a reader needs, so it must not be guessed. It has its own expiry: every gateway
replica can tell without asking the store, and another expiry makes the name of no image.
"""

import math
import re
import secrets
import time
from dataclasses import dataclass

from serve_app.protocol.images import IMAGE_FORMATS, ImageFormat

SECRET_BYTES = 24

_NAME = re.compile(
    rf"(?P<expires>[0-9a-f]{{10}})-[0-9a-f]{{{2 * SECRET_BYTES}}}"
    rf"\.(?P<format>{'|'.join(IMAGE_FORMATS)})"
)


@dataclass(frozen=True)
class ImageName:
    """The name of one image: the last part of its link, and of its key in the store."""

    text: str
    expires_at: int
    """Unix time in seconds."""
    format: ImageFormat

    @classmethod
    def new(cls, image_format: ImageFormat, ttl_s: int) -> "ImageName":
        """Draw a name that expires after ``ttl_s`` seconds."""
        expires_at = math.ceil(time.time() + ttl_s)
        secret = secrets.token_hex(SECRET_BYTES)
        return cls(f"{expires_at:010x}-{secret}.{image_format}", expires_at, image_format)

    @classmethod
    def parse(cls, text: str) -> "ImageName | None":
        """Read a name; ``None`` if it cannot be one of ours."""
        found = _NAME.fullmatch(text)
        if found is None:
            return None
        [image_format] = (name for name in IMAGE_FORMATS if name == found["format"])
        return cls(text, int(found["expires"], 16), image_format)

    @property
    def media_type(self) -> str:
        return f"image/{self.format}"

    @property
    def remaining_s(self) -> int:
        """Whole seconds until it expires."""
        return max(0, math.floor(self.expires_at - time.time()))

    @property
    def is_expired(self) -> bool:
        return time.time() >= self.expires_at
