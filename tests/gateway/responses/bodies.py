"""Bodies of the Responses API as clients send them: names and shapes of fields."""

from typing import Any

IMAGE_TOOL: dict[str, Any] = {"type": "image_generation"}

HOME_ASSISTANT: dict[str, Any] = {
    "model": "gpt-5-mini",
    "input": [
        {"type": "message", "role": "developer", "content": "You are a voice assistant."},
        {"type": "message", "role": "user", "content": "a red circle on a blue background"},
    ],
    "max_output_tokens": 3000,
    "user": "01KAFJ3Y1V5N9W3W2R2G9M8T7Q",
    "store": True,
    "stream": True,
    "reasoning": {"effort": "low", "summary": "auto"},
    "include": ["reasoning.encrypted_content"],
    "text": {"verbosity": "medium"},
    "prompt_cache_retention": "24h",
    "service_tier": "auto",
    "tools": [
        IMAGE_TOOL | {"model": "gpt-image-1.5", "output_format": "png", "input_fidelity": "high"}
    ],
    "tool_choice": {"type": "image_generation"},
}
"""The task "generate image" of Home Assistant's OpenAI integration."""


def attached(body: dict[str, Any], url: str) -> dict[str, Any]:
    """Return the body with an image beside the user's text, as clients attach files."""
    *others, message = body["input"]
    parts = [
        {"type": "input_text", "text": message["content"]},
        {"type": "input_image", "image_url": url, "detail": "auto"},
    ]
    return body | {"input": [*others, message | {"content": parts}]}
