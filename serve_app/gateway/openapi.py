"""What the endpoints take and answer, for their OpenAPI description."""

from typing import Any

from pydantic import BaseModel

from serve_app.config import AppConfig, LimitsConfig
from serve_app.gateway.schemas import ImageEditRequest, ImageGenerationRequest, Kind

_FILE = {"type": "string", "format": "binary"}


def described(config: AppConfig) -> str:
    """The heading of the description."""
    return (
        f"Paints pictures with the model `{config.model.id}`. OpenAI's images API: any of its "
        "clients works, with this server's address and `/v1` as base URL.\n\n"
        "Where the server has API keys, send one as `Authorization: Bearer KEY`. Every error is "
        '`{"error": {"message", "type", "param", "code"}}`, and every response carries '
        "`x-request-id`."
    )


def generation_body(limits: LimitsConfig) -> dict[str, Any]:
    """Of ``POST /v1/images/generations``."""
    return _body("application/json", _schema(ImageGenerationRequest, limits))


def edit_body(limits: LimitsConfig) -> dict[str, Any]:
    """Of ``POST /v1/images/edits``."""
    schema = _schema(ImageEditRequest, limits)
    files = {
        "image": _FILE
        | {
            "description": "The picture to start from: PNG, JPEG or WebP, of at most "
            f"{limits.max_image_pixels} pixels. Turned as its EXIF says; transparent parts become "
            "white."
        },
        "mask": _FILE
        | {
            "description": "PNG or WebP of the same size, transparent where the picture shall be "
            "painted anew. Without one, all of it is."
        },
    }
    schema["properties"] = files | schema["properties"]
    schema["required"] = ["image", *schema["required"]]
    return _body("multipart/form-data", schema)


def streamed(kind: Kind) -> dict[int | str, dict[str, Any]]:
    """The other form of a good answer."""
    text = (
        f"With `stream`: server-sent events. `{kind}.partial_image` carries a preview, "
        f"`{kind}.progress` (with `progress`) how far the picture is, `{kind}.completed` the "
        "picture, and is the last. An `error` event carries an `error` object, and is the last as "
        "well."
    )
    content = {"text/event-stream": {"schema": {"type": "string", "description": text}}}
    return {200: {"description": "The pictures.", "content": content}}


def _body(media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


def _schema(body: type[BaseModel], limits: LimitsConfig) -> dict[str, Any]:
    """With the ranges that the configuration sets."""
    schema = body.model_json_schema()
    properties = schema["properties"]
    ranges = {
        "n": {"maximum": limits.max_images},
        "num_inference_steps": {"maximum": limits.max_steps},
        "deadline_s": {"maximum": limits.max_deadline_s},
        "prompt": {"minLength": 1, "maxLength": limits.max_prompt_chars},
        "negative_prompt": {"maxLength": limits.max_prompt_chars},
    }
    for name, given in ranges.items():
        field = properties[name]
        # What may be null is one of several; the range is that of the first.
        field.get("anyOf", [field])[0].update(given)
    return schema
