"""Fields of OpenAI's API that this server cannot honour: hints get a warning, the others a 400.

A field whose effect shows in the image file is rejected, because the image would not be the
requested one. A hint tells a model how to work, and asks for no particular image.
"""

REJECTED = {
    "frame_count": "this server generates no animations; leave it out.",
    "frame_duration_ms": "this server generates no animations; leave it out.",
    "markup": "this server takes no drawing over the image; draw on the image itself, or use mask.",
    "svg": "this server generates pixels, not SVG; leave it out.",
}
"""Reasons why a field is rejected, with the remedy."""

_HINTS = {
    "complexity": "use quality or num_inference_steps instead.",
    "input_fidelity": "use strength to set how much of the image may change.",
    "moderation": "it is the same for all requests.",
    "style": "describe the style in the prompt.",
}
"""Hints without effect, with the remedy."""

_DEFAULTS = {"moderation": "auto"}
"""Values of hints for what this server does anyway."""


def hint_warnings(given: dict[str, object]) -> list[str]:
    """Return a warning for each hint that a request gives."""
    return [
        f"{name} has no effect: {reason}"
        for name, reason in _HINTS.items()
        if given.get(name) is not None and given[name] != _DEFAULTS.get(name)
    ]
