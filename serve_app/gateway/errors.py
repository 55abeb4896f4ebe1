"""The one place where exceptions become HTTP responses, always in OpenAI's error object."""

import logging
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, get_args

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette._utils import get_route_path
from starlette.exceptions import HTTPException
from starlette.types import Scope

from serve_app.errors import (
    DiffusionServeError,
    InvalidKey,
    InvalidRequest,
    NotFinite,
    Overloaded,
    Unavailable,
    UnsupportedEncoding,
)
from serve_app.gateway.openai_fields import REJECTED
from serve_app.gateway.requests_log import record_of, request_id
from serve_app.gateway.retry_after import documented_headers, retry_headers
from serve_app.gateway.schemas import ErrorDetail, ErrorResponse

logger = logging.getLogger(__name__)

MOST_SHOWN = 100
"""Characters of a client's value that an error repeats."""

_REASONS = {
    400: "A field of the request is wrong, and the message names it. Or an image was blocked.",
    401: "The request has no API key, or an unknown one.",
    403: "A page of another web site sent the request, and no Bearer key.",
    404: "The model, the LoRA adapter, the image or the path does not exist.",
    408: "The body did not arrive in time.",
    413: "The body is longer than the server's limit.",
    415: "The header Content-Encoding names a compression. Send the body without one.",
    416: "The header Range asks for bytes beyond the end of the image.",
    429: "The server is overloaded, or the limits of the API key are used up.",
    499: "The request was interrupted.",
    500: "The generation failed. The server's log has the reason.",
    503: "No replica can generate now, or the storage of images is away.",
    504: "The image was not done within the server's longest deadline.",
}


@dataclass(frozen=True)
class Problem:
    """The answer to the client for an exception."""

    status: int
    detail: ErrorDetail
    headers: dict[str, str]
    repeated: bool = False
    """Repeat the message as ``detail``, where clients of A1111's API look."""

    def response(self) -> JSONResponse:
        body = ErrorResponse(error=self.detail).model_dump()
        if self.repeated:
            body["detail"] = self.detail.message
        return JSONResponse(body, self.status, self.headers)


def problem_of(error: Exception, scope: Scope) -> Problem:
    """Convert an exception to an answer, and note it in the request's record.

    Details of server errors go to the log, not to the client, except that an image is not finite.
    """
    given: dict[str, str] = {}
    if isinstance(error, HTTPException):
        given = dict(error.headers or {})
        error = _from_http(error, scope)
    if isinstance(error, DiffusionServeError) and (error.status < 500 or error.status > 502):
        status, message, ours = error.status, error.message, error
    else:
        number = request_id(scope)
        logger.error("request %s failed", number, exc_info=error)
        ours = error if isinstance(error, DiffusionServeError) else DiffusionServeError("")
        status = ours.status
        reason = "The image could not be generated."
        if isinstance(ours, NotFinite):
            reason = f"The image could not be generated: {ours}"
        message = f"{reason} See the server's log for request {number}."
    record = record_of(scope)
    record.failed(ours)
    detail = ErrorDetail(message=message, type=ours.type, param=ours.param, code=ours.code)
    headers = error_headers(ours)
    if record.traceparent:
        headers["traceparent"] = record.traceparent
    return Problem(status, detail, given | headers, get_route_path(scope).startswith("/sdapi/"))


def error_headers(error: DiffusionServeError) -> dict[str, str]:
    """Return the headers of an error's response: the retry, and what the server accepts."""
    headers = retry_headers(error)
    if isinstance(error, InvalidKey):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, UnsupportedEncoding):
        headers["Accept-Encoding"] = "identity"
    return headers


class _HttpError(InvalidRequest):
    """An error from Starlette or Serve's proxy, such as a path that does not exist."""

    code = "http_error"

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status  # type: ignore[misc]  # a class variable elsewhere


def _from_http(error: HTTPException, scope: Scope) -> DiffusionServeError:
    path = scope["path"][:MOST_SHOWN]
    match error.status_code:
        case 404:
            return _HttpError(404, f"no such path: {path}")
        case 405:
            return _HttpError(405, f"{scope['method']} is not allowed on {path}")
        case 408:
            return _HttpError(408, "the request took longer than this server allows.")
        case 429:
            return Overloaded("too many requests are waiting; try again later.")
        case 503:
            return Unavailable("no replica can take the request; try again in a few seconds.")
        case status if status >= 500:
            return DiffusionServeError(str(error.detail))
        case status:
            return _HttpError(status, str(error.detail))


def from_validation(error: ValidationError, model: type[BaseModel]) -> InvalidRequest:
    """Convert pydantic's first problem to an error that names the field and what is allowed."""
    problem = error.errors(include_url=False)[0]
    param = _param(problem["loc"], model)
    match problem["type"]:
        case "json_invalid":
            reason = problem["msg"].removeprefix("Invalid JSON: ")
            message = f"the body is not JSON: {reason}."
        case "extra_forbidden" if param in REJECTED:
            message = f"{param}: {REJECTED[param]}"
        case "extra_forbidden" if len(problem["loc"]) > 1:
            message = f"unknown field {param!r}; leave it out."
        case "extra_forbidden":
            message = f"unknown field {param!r}; known are {', '.join(model.model_fields)}."
        case "missing":
            message = f"the field {param!r} is required."
        case "model_type":
            given = type(problem["input"]).__name__
            message = f"{param or 'the body'} must be a JSON object, not {given}."
        case _ if param is None:
            message = f"the body: {problem['msg'][0].lower()}{problem['msg'][1:]}."
        case _:
            message = f"{param}: {problem['msg'][0].lower()}{problem['msg'][1:]}."
            field = model.model_fields.get(str(problem["loc"][0]))
            if field is not None and field.description is not None:
                message = f"{message} {field.description}"
    return InvalidRequest(message, param)


def _param(loc: tuple[int | str, ...], model: type[BaseModel]) -> str | None:
    """Return the problem's location, as ``lora.ink``, without pydantic's names of union members."""
    if not loc:
        return None
    name, *within = map(str, loc)
    field = model.model_fields.get(name)
    kind = None if field is None else field.annotation
    if isinstance(kind, UnionType) and len(set(get_args(kind)) - {NoneType}) > 1:
        within = within[1:]
    return ".".join([name, *within])[:MOST_SHOWN]


def add_error_handlers(api: FastAPI) -> None:
    """Route every exception that leaves an endpoint through this module."""

    async def respond(request: Request, error: Exception) -> JSONResponse:
        return problem_of(error, request.scope).response()

    for kind in (DiffusionServeError, HTTPException, Exception):
        api.add_exception_handler(kind, respond)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the error responses of an endpoint, for OpenAPI."""
    return {
        status: {
            "model": ErrorResponse,
            "description": _REASONS[status],
            "headers": documented_headers(status),
        }
        for status in statuses
    }
