"""The OpenAPI description of the body."""

from typing import Any

from serve_app.config.limits import LimitsConfig
from serve_app.gateway.image_request import ImageEditRequest
from serve_app.gateway.openapi import body_schema, nullable
from serve_app.gateway.responses.fields import IMAGE_TOOL, ResponsesRequest
from serve_app.gateway.responses.translation import MASK, TOOL_FIELDS

_DATA_URL = {"type": "string", "pattern": "^data:image/(png|jpeg|webp);base64,"}


def request_body(limits: LimitsConfig) -> dict[str, Any]:
    """Describe the body: a request of the user with one tool, as clients should send it."""
    schema = ResponsesRequest.model_json_schema()
    fields = schema["properties"]
    text = {"type": "string", "minLength": 1, "maxLength": limits.max_prompt_chars}
    fields["input"]["anyOf"] = [
        text,
        {"type": "array", "items": _message(text), "minItems": 1},
    ]
    fields["tools"] |= {"items": _tool(limits), "minItems": 1, "maxItems": 1}
    del fields["tools"]["default"]
    fields["tool_choice"]["anyOf"] = [
        {"enum": ["auto", "required"]},
        _object(type={"const": IMAGE_TOOL}),
        {"type": "null"},
    ]
    schema["required"] = ["input", "tools"]
    schema["properties"] = {
        name: field if name in schema["required"] else nullable(field)
        for name, field in fields.items()
    }
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _message(text: dict[str, Any]) -> dict[str, Any]:
    parts = [
        _object(type={"const": "input_text"}, text=text),
        _object(type={"const": "input_image"}, image_url=_DATA_URL),
    ]
    content = {"anyOf": [text, {"type": "array", "items": {"anyOf": parts}}]}
    return _object(role={"enum": ["user", "system", "developer"]}, content=content)


def _tool(limits: LimitsConfig) -> dict[str, Any]:
    fields = body_schema(ImageEditRequest, limits)["properties"]
    others: dict[str, Any] = {
        "action": {"enum": ["auto", "generate", "edit"]},
        MASK: _object(image_url=_DATA_URL),
    }
    others |= {name: field for name, field in fields.items() if name in TOOL_FIELDS}
    tool = _object(type={"const": IMAGE_TOOL})
    tool["properties"] |= {name: nullable(field) for name, field in others.items()}
    return tool


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}
