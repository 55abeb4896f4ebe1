"""Bodies of the image endpoints: JSON, and multipart forms of edits.

FastAPI does not parse them, because its errors are not OpenAI's.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile

from serve_app.config.gateway import UnknownFields
from serve_app.errors import InvalidRequest, UnsupportedEncoding
from serve_app.gateway.data_urls import file_of_url
from serve_app.gateway.errors import MOST_SHOWN, from_validation
from serve_app.gateway.forms import multipart_form
from serve_app.gateway.image_request import (
    MOST_INPUT_IMAGES,
    ImageEditRequest,
    ImageGenerationRequest,
    JsonEditRequest,
)
from serve_app.gateway.input_images import in_image_thread
from serve_app.gateway.openai_fields import REJECTED

MOST_NAMED = 8
"""Query parameters, or unknown fields, that a warning names."""
_FILES = ("image", "mask")

Place = tuple[int | str, ...]
"""A field of a JSON body: names of objects' keys, and indices of lists."""

Body = TypeVar("Body", bound=BaseModel)


async def read_json(request: Request, model: type[Body], each_once: bool = False) -> Body:
    """Parse a JSON body. The content type is ignored.

    ``each_once`` rejects keys that are given twice, of which the last one counts otherwise.

    Raises:
        InvalidRequest: naming the field and what is allowed.
        UnsupportedEncoding: the body is compressed.
    """
    reject_compressed(request)
    content = await request.body()
    try:
        body = model.model_validate_json(content)
        if each_once:
            json.loads(content, object_pairs_hook=_each_once)
        return body
    except ValidationError as error:
        raise from_validation(error, model) from None


async def read_generation(
    request: Request, unknown_fields: UnknownFields = "reject"
) -> tuple[ImageGenerationRequest, tuple[str, ...]]:
    """Parse the JSON body. The content type is ignored: `curl -d` sends that of a form.

    Returns the fields, and warnings of those that are ignored.

    Raises:
        InvalidRequest: naming the field and what is allowed.
        UnsupportedEncoding: the body is compressed.
    """
    reject_compressed(request)
    return _strictly(await request.body(), ImageGenerationRequest, unknown_fields)


def _strictly(
    content: bytes, model: type[Body], unknown_fields: UnknownFields
) -> tuple[Body, tuple[str, ...]]:
    """Parse a JSON body. Returns it, and warnings of fields that are ignored."""
    try:
        try:
            body = model.model_validate_json(content)
            strays: tuple[Place, ...] = ()
        except ValidationError as error:
            strays = _strays(error)
            if unknown_fields == "reject" or not strays:
                raise
            known = _without(json.loads(content, object_pairs_hook=_each_once), strays)
            # As text again: of Python values, pydantic would take some that JSON does not have.
            body = model.model_validate_json(json.dumps(known))
    except ValidationError as error:
        raise from_validation(error, model) from None
    json.loads(content, object_pairs_hook=_each_once)  # pydantic takes the last of equal keys
    return body, _ignored(".".join(map(str, place)) for place in strays)


def _strays(error: ValidationError) -> tuple[Place, ...]:
    """Return the places of the unknown fields in a body."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    return tuple(
        problem["loc"]
        for problem in problems
        if problem["type"] == "extra_forbidden"
        if problem["loc"][0] not in REJECTED
    )


def _without(content: Any, places: Iterable[Place]) -> Any:
    """Remove fields from a JSON value, and return it."""
    for *way, name in places:
        within = content
        for step in way:
            within = within[step]
        within.pop(name)
    return content


def _ignored(names: Iterable[str]) -> tuple[str, ...]:
    listed = _listed(names)
    return (f"unknown fields have no effect: {listed}.",) if listed else ()


@dataclass(frozen=True)
class EditBody:
    """The body of an edit. Its images are not yet decoded."""

    fields: ImageEditRequest
    images: tuple[bytes, ...]
    mask: bytes | None
    warnings: tuple[str, ...] = ()
    """Warnings of fields that are ignored."""


async def read_edit(request: Request, unknown_fields: UnknownFields = "reject") -> EditBody:
    """Parse the body: a multipart form, or JSON with data URLs.

    Lists and objects of a form may come in brackets, as OpenAI's clients send them.

    Raises:
        InvalidRequest: naming the field and what is allowed.
        UnsupportedEncoding: the body is compressed.
    """
    reject_compressed(request)
    given, options = parse_options_header(request.headers.get("content-type"))
    kind = given.decode("latin-1").lower()
    if kind == "application/json":
        return await _edit_of_json(await request.body(), unknown_fields)
    if kind != "multipart/form-data":
        raise InvalidRequest(
            "the body must be multipart/form-data or application/json, not "
            f"{kind[:100] or 'without a content type'}."
        )
    # Starlette would decode by any codec of Python's, some of which raise on every input.
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8"):
        raise InvalidRequest(f"the body must be in UTF-8, not {charset[:100]!r}.")
    return await _edit_of_form(request, unknown_fields)


async def _edit_of_json(content: bytes, unknown_fields: UnknownFields) -> EditBody:
    body, ignored = _strictly(content, JsonEditRequest, unknown_fields)
    mask = body.mask

    def files() -> tuple[tuple[bytes, ...], bytes | None]:
        images = tuple(
            file_of_url(image.image_url, f"images.{index}.image_url")
            for index, image in enumerate(body.images)
        )
        return images, None if mask is None else file_of_url(mask.image_url, "mask.image_url")

    return EditBody(body.without_images(), *await in_image_thread(files), ignored)


async def _edit_of_form(request: Request, unknown_fields: UnknownFields) -> EditBody:
    texts: dict[str, object] = {}
    images: list[bytes] = []
    mask: bytes | None = None
    strays: dict[str, None] = {}
    async with multipart_form(request) as form:
        for name, value in form.multi_items():
            field = name.removesuffix("[]")
            shown = field[:MOST_SHOWN]
            if field in REJECTED:
                raise InvalidRequest(f"{field}: {REJECTED[field]}", field)
            known = field.partition("[")[0] in ImageEditRequest.model_fields or field in _FILES
            if not known and unknown_fields == "ignore":
                strays[field] = None
                continue
            if isinstance(value, UploadFile) != (field in _FILES):
                wanted = "a file" if field in _FILES else "text"
                raise InvalidRequest(f"{shown} must be {wanted}.", shown)
            if field in texts or (field == "mask" and mask is not None):
                raise InvalidRequest(f"{shown} is given twice; send it once.", shown)
            if not isinstance(value, UploadFile):
                _add(texts, field, value)
            elif field == "mask":
                mask = await value.read()
            elif len(images) < MOST_INPUT_IMAGES:
                images.append(await value.read())
            else:
                raise InvalidRequest(
                    f"image is given more than {MOST_INPUT_IMAGES} times; send fewer.", field
                )
    if not images:
        raise InvalidRequest("the file 'image' is required.", "image")
    try:
        fields = ImageEditRequest.model_validate_strings(texts, strict=False)
    except ValidationError as error:
        raise from_validation(error, ImageEditRequest) from None
    return EditBody(fields, tuple(images), mask, _ignored(strays))


def query_warnings(request: Request) -> list[str]:
    """Warn of query parameters, which no endpoint of images reads."""
    names = dict.fromkeys(request.query_params.keys())
    if not names:
        return []
    return [f"query parameters have no effect: {_listed(names)}. Send fields in the body."]


def _listed(names: Iterable[str]) -> str:
    shown = [repr(name[:MOST_SHOWN]) for name in names]
    return ", ".join(shown[:MOST_NAMED]) + (", …" if len(shown) > MOST_NAMED else "")


def reject_compressed(request: Request) -> None:
    """Reject a body in a coding: limits count the bytes that arrive, and few could become many."""
    given = ", ".join(request.headers.getlist("content-encoding"))
    codings = {coding.strip().lower() for coding in given.split(",")}
    if codings - {"", "identity"}:
        raise UnsupportedEncoding(
            f"the header Content-Encoding is {given[:MOST_SHOWN]!r}; send the body without "
            "compression, and without this header."
        )


def _add(texts: dict[str, object], field: str, value: str) -> None:
    """Add a field: ``lora[ink]=0.5``, or JSON, becomes an entry of the object ``lora``."""
    name, bracket, key = field.partition("[")
    if bracket and key.endswith("]"):
        within = texts.setdefault(name, {})
        if not isinstance(within, dict) or key[:-1] in within:
            shown = name[:MOST_SHOWN]
            raise InvalidRequest(f"{shown} is given twice; send it once.", shown)
        within[key[:-1]] = value
    elif field == "lora" and value.startswith("{"):
        try:
            parsed = json.loads(value, object_pairs_hook=_each_once)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{field} is not JSON: {error}", field) from None
        texts[field] = {key: str(scale) for key, scale in parsed.items()}
    else:
        texts[field] = value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON, in which each key must be given once."""
    content = dict(pairs)
    if len(content) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        shown = name[:MOST_SHOWN]
        raise InvalidRequest(f"{shown} is given twice; send it once.", shown)
    return content
