"""The HTTP API page, from the OpenAPI document that a server with the default config answers."""

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, cast

from fastapi import FastAPI

from serve_app.config.models import AppConfig
from serve_app.gateway.auth import KeyRing
from serve_app.gateway.openapi import EVENTS
from serve_app.gateway.responses.answers import EVENTS as RESPONSE_EVENTS
from serve_app.gateway.routes import EDITS, GENERATIONS, create_api
from serve_app.protocol.backend import GenerationBackend
from tools.docs.markdown import code, named, prose, table
from tools.docs.reference.json_schema import Schema, type_of, value_of

_BODIES = {"application/json": "JSON body", "multipart/form-data": "Multipart form"}


_OF_FASTAPI = {
    "/docs": "Return the interactive description of the API. It needs no other host.",
    "/docs/oauth2-redirect": "Return a page that `/docs` may use.",
    "/openapi.json": "Return the OpenAPI document.",
    "/static-offline-docs": "Return the files of `/docs`.",
}


@cache
def api() -> FastAPI:
    """Return the gateway's API with the default configuration. To describe it needs no backend."""
    return create_api(AppConfig(), cast(GenerationBackend, None), KeyRing(None, None))


def document() -> Mapping[str, Any]:
    """Return the OpenAPI document of `api`."""
    return api().openapi()


def http_api() -> str:
    """Return a section for each path and method."""
    return "\n\n".join(
        _operation(method, path, operation)
        for path, operations in document()["paths"].items()
        for method, operation in operations.items()
    )


def undescribed_paths() -> dict[str, str]:
    """Return the paths that are not in the OpenAPI document, with their meanings."""
    found: dict[str, str] = {}
    for route in api().routes:
        path = str(getattr(route, "path", ""))
        if not getattr(route, "include_in_schema", False) and path not in document()["paths"]:
            about = inspect.getdoc(getattr(route, "endpoint", None)) or ""
            found[path] = _OF_FASTAPI.get(path) or prose(about)
    return found


def other_paths() -> str:
    """Return a table of the paths that are not in the OpenAPI document."""
    rows = sorted((code(f"GET {path}"), about) for path, about in undescribed_paths().items())
    return table(("Path", "Meaning"), rows)


def stream_events() -> str:
    """Return a section for each event of a stream, without the errors."""
    return "\n\n".join(map(_object, _event_names()))


def schemas() -> str:
    """Return a section for each object of responses and events, except the events themselves."""
    shown = [name for name in described_schemas() if name not in _event_names()]
    return "\n\n".join(map(_object, shown))


def described_schemas() -> list[str]:
    """Return the objects that are reached from a response or an event, outer ones first."""
    found: list[str] = []
    queue = [*_references(_answers()), *_event_names()]
    while queue:
        name = queue.pop(0)
        if name not in found:
            found.append(name)
            queue += _references(document()["components"]["schemas"][name])
    return found


def _event_names() -> list[str]:
    return [model.__name__ for model in (*EVENTS.values(), *RESPONSE_EVENTS)]


def _answers() -> list[Any]:
    paths = document()["paths"].values()
    return [operation["responses"] for operations in paths for operation in operations.values()]


def _references(schema: Any) -> Iterator[str]:
    """Yield the names of the objects to which a schema refers."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            yield schema["$ref"].rsplit("/", 1)[-1]
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    parts = [f"## {code(f'{method.upper()} {path}')}", prose(operation["description"])]
    parameters = operation.get("parameters", ())
    if parameters:
        rows = [
            (code(one["name"]), one["in"], type_of(one["schema"]), one["description"])
            for one in parameters
        ]
        parts.append(table(("Parameter", "In", "Type", "Meaning"), rows))
    for media_type, body in operation.get("requestBody", {}).get("content", {}).items():
        parts += [f"**{_BODIES[media_type]}** ({code(media_type)}):", _fields(body["schema"], path)]
        if path == EDITS:
            parts.append(
                f"The fields of [{code('POST ' + GENERATIONS)}](#post-v1imagesgenerations) apply "
                "here as well."
            )
    rows = [
        (code(status), response["description"], _content(response), _headers(response))
        for status, response in operation["responses"].items()
    ]
    parts.append(table(("Status", "When", "Body", "Headers"), rows))
    return "\n\n".join(parts)


def shared_fields() -> set[str]:
    """Return the fields of the generations, which edits have, too."""
    operation = document()["paths"][GENERATIONS]["post"]
    [body] = operation["requestBody"]["content"].values()
    return set(body["schema"]["properties"])


def _fields(schema: Schema, path: str) -> str:
    required = schema.get("required", ())
    elsewhere = shared_fields() if path == EDITS else set()
    rows = [
        (code(name), value_of(field, name in required), named(field["description"]))
        for name, field in schema["properties"].items()
        if name not in elsewhere
    ]
    return table(("Field", "Value", "Meaning"), rows)


def _object(name: str) -> str:
    schema = document()["components"]["schemas"][name]
    rows = [
        (code(field), type_of(about), named(about.get("description", "")))
        for field, about in schema["properties"].items()
    ]
    heading = f"### {name} {{: #{name.lower()} }}"
    return "\n\n".join(
        [heading, prose(schema["description"]), table(("Field", "Type", "Meaning"), rows)]
    )


def _content(response: Mapping[str, Any]) -> str:
    kinds = []
    for media_type, content in response.get("content", {}).items():
        if media_type == "text/event-stream":
            kinds.append("[events](#events)")
        else:
            kinds.append(type_of(content["schema"]))
    return " or ".join(kinds) or "—"


def _headers(response: Mapping[str, Any]) -> str:
    return ", ".join(map(code, response.get("headers", {}))) or "—"
