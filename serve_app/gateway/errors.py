"""The one place where exceptions become HTTP responses, always in OpenAI's error object."""

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from serve_app.errors import DiffusionServeError, InvalidRequest
from serve_app.gateway.schemas import ErrorDetail, ErrorResponse

logger = logging.getLogger(__name__)


def error_response(
    status: int, message: str, type_: str, param: str | None = None, code: str | None = None
) -> JSONResponse:
    """An error in OpenAI's shape; 503 tells when to come back."""
    detail = ErrorDetail(message=message, type=type_, param=param, code=code)
    headers = {"Retry-After": "5"} if status == 503 else None
    return JSONResponse(ErrorResponse(error=detail).model_dump(), status, headers)


def from_validation(error: ValidationError) -> InvalidRequest:
    """The first problem that pydantic found, in words that name the field and what is allowed."""
    problem = error.errors(include_url=False)[0]
    param = ".".join(str(part) for part in problem["loc"]) or None
    message = _explain(problem["type"], param, problem["msg"], type(problem["input"]).__name__)
    return InvalidRequest(message, param)


def _explain(kind: str, param: str | None, message: str, given: str) -> str:
    match kind:
        case "json_invalid":
            return f"the body is not JSON: {message.removeprefix('Invalid JSON: ')}."
        case "extra_forbidden":
            return f"unknown field {param!r}."
        case "missing":
            return f"the field {param!r} is required."
        case _ if param is None:
            return f"the body must be a JSON object, not {given}."
        case _:
            return f"{param}: {message[0].lower()}{message[1:]}."


def _of_ours(error: Exception) -> JSONResponse:
    assert isinstance(error, DiffusionServeError)
    if error.status >= 500 and error.status != 503:
        logger.error("request failed", exc_info=error)
        return error_response(
            error.status, "The picture could not be made.", error.type, None, error.code
        )
    return error_response(error.status, error.message, error.type, error.param, error.code)


def _of_http(error: HTTPException, request: Request) -> JSONResponse:
    messages = {
        404: f"no such path: {request.url.path}",
        405: f"{request.method} is not allowed on {request.url.path}",
    }
    message = messages.get(error.status_code, str(error.detail))
    response = error_response(error.status_code, message, "invalid_request_error")
    response.headers.update(error.headers or {})
    return response


def add_error_handlers(api: FastAPI) -> None:
    """Route every exception that leaves an endpoint through this module."""

    @api.exception_handler(DiffusionServeError)
    async def ours(_: Request, error: Exception) -> JSONResponse:
        return _of_ours(error)

    @api.exception_handler(HTTPException)
    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return _of_http(error, request)

    @api.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> JSONResponse:
        logger.error("unexpected error", exc_info=error)
        return error_response(500, "Internal error.", "server_error", None, "internal_error")


def documented(statuses: Sequence[int]) -> dict[int | str, dict[str, Any]]:
    """The error responses of an endpoint, for its OpenAPI description."""
    return {status: {"model": ErrorResponse} for status in statuses}
