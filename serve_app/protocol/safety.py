"""The verdict of a safety checker on one image."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SafetyVerdict:
    """The verdict on one image. No verdict (``None``) means that nothing looked at the image."""

    flagged: bool
    """True if the image may be unsafe."""
