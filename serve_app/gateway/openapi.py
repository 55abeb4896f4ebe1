"""The OpenAPI description of the endpoints."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve_app.config.limits import LimitsConfig
from serve_app.config.models import AppConfig
from serve_app.gateway.image_request import (
    MOST_INPUT_IMAGES,
    ImageEditRequest,
    ImageGenerationRequest,
    JsonEditRequest,
)
from serve_app.gateway.schemas import (
    CompletedEvent,
    ErrorResponse,
    ImageOperation,
    PartialImageEvent,
    ProgressEvent,
)

EVENTS: dict[str, type[BaseModel]] = {
    "partial_image": PartialImageEvent,
    "progress": ProgressEvent,
    "completed": CompletedEvent,
}

_REFERENCE = "#/components/schemas/{model}"

_FILE = {"type": "string", "format": "binary"}


def described(config: AppConfig) -> str:
    """Write the description's introduction."""
    # The description needs no key, and a key may not see all of several models.
    models = "models of `/v1/models`" if config.models else f"model `{config.model.id}`"
    return (
        f"Generates images with the {models}. The API is "
        "OpenAI's images API: use any of its clients, with this server's address and `/v1` as base "
        "URL.\n\n"
        "If the server has API keys, send one as `Authorization: Bearer KEY`. Every error has the "
        'body `{"error": {"message", "type", "param", "code"}}`. Every response has the header '
        "`x-request-id`."
    )


def generation_body(limits: LimitsConfig) -> dict[str, Any]:
    """Describe the body of ``POST /v1/images/generations``."""
    return _body({"application/json": _with_null(body_schema(ImageGenerationRequest, limits))})


def edit_body(limits: LimitsConfig) -> dict[str, Any]:
    """Describe the body of ``POST /v1/images/edits``."""
    form = body_schema(ImageEditRequest, limits)
    files = {
        "image": {
            "type": "array",
            "items": _FILE,
            "minItems": 1,
            "maxItems": MOST_INPUT_IMAGES,
            "description": "Input image: PNG, JPEG or WebP, of at most "
            f"{limits.max_image_pixels} pixels. Its EXIF orientation is applied. Transparent parts "
            "become white. Several images are parts with this name, or `image[]`: /v1/models has "
            "the number that the model takes.",
        },
        "mask": _FILE
        | {
            "description": "PNG or WebP of the same size. Its transparent parts are generated "
            "again. Without a mask, the whole image is."
        },
    }
    form["properties"] = files | form["properties"]
    form["required"] = ["image", *form["required"]]
    body = _with_null(body_schema(JsonEditRequest, limits))
    # In place: a reference within this part would lead out of it.
    reference = body.pop("$defs")["ImageReference"]
    body["properties"]["images"]["items"] = reference
    body["properties"]["mask"]["anyOf"][0] = reference
    return _body({"multipart/form-data": form, "application/json": body})


def streamed(kind: ImageOperation) -> dict[int | str, dict[str, Any]]:
    """Describe the streamed form of a successful answer."""
    names = [*(f"{kind}.{name}" for name in EVENTS), "error"]
    return event_stream(names, (*EVENTS.values(), ErrorResponse), "The images")


def event_stream(
    names: Sequence[str], models: Sequence[type[BaseModel]], otherwise: str
) -> dict[int | str, dict[str, Any]]:
    """Describe the streamed form of an answer that is ``otherwise`` JSON.

    Its schema is that of one event, because OpenAPI 3.1 cannot describe a stream of events.
    """
    event = {
        "type": "object",
        "description": "With `stream`: server-sent events. The last one is the image or an error.",
        "properties": {
            "event": {"enum": list(names)},
            "data": {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": {
                    "oneOf": [{"$ref": _REFERENCE.format(model=model.__name__)} for model in models]
                },
            },
        },
        "required": ["event", "data"],
    }
    content = {"text/event-stream": {"schema": event}}
    return {200: {"description": f"{otherwise}, or a stream of events.", "content": content}}


def complete(api: FastAPI, with_keys: bool, events: Sequence[type[BaseModel]]) -> None:
    """Add the events, which no endpoint returns by itself, and the keys, if there are any.

    Removes FastAPI's status 422: no parameter of a path can be wrong, and bodies are parsed here.
    """
    stock = api.openapi

    def openapi() -> dict[str, Any]:
        described = stock()
        models = [(model, "serialization") for model in events]
        _, definitions = models_json_schema(models, ref_template=_REFERENCE)  # type: ignore[arg-type]
        components = described["components"]["schemas"]
        components |= definitions["$defs"]
        for name in ("HTTPValidationError", "ValidationError"):
            components.pop(name, None)
        for operations in described["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        if with_keys:
            schemes = {"key": "bearer", "password": "basic"}
            described["components"]["securitySchemes"] = {
                name: {"type": "http", "scheme": scheme} for name, scheme in schemes.items()
            }
            for path, operations in described["paths"].items():
                guarded = path.startswith(("/v1/", "/sdapi/"))
                for operation in operations.values() if guarded else ():
                    operation.setdefault("security", [{name: []} for name in schemes])
        return described

    api.openapi = openapi  # type: ignore[method-assign]


def _body(schemas: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Describe a body by its schema in each media type."""
    content = {media_type: {"schema": schema} for media_type, schema in schemas.items()}
    return {"requestBody": {"required": True, "content": content}}


def _with_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Allow null in place of each field that may be left out."""
    for name, field in schema["properties"].items():
        if name not in schema["required"]:
            schema["properties"][name] = nullable(field)
    return schema


def nullable(field: dict[str, Any]) -> dict[str, Any]:
    """Allow null in place of a field, which means the default. Forms have no null."""
    if "anyOf" in field:
        return field
    names = [name for name in ("title", "description", "default") if name in field]
    about = {name: field.pop(name) for name in names}
    return {"anyOf": [field, {"type": "null"}]} | about


def body_schema(body: type[BaseModel], limits: LimitsConfig) -> dict[str, Any]:
    """Return a body's schema with the ranges from the configuration."""
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
        # A nullable field is a union; the range belongs to its first member.
        field.get("anyOf", [field])[0].update(given)
    return schema
