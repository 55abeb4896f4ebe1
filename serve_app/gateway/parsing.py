"""Bodies of the image endpoints: JSON and multipart forms.

FastAPI does not parse them, because its errors are not OpenAI's.
"""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from pydantic import ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile

from serve_app.errors import InvalidRequest, UnsupportedEncoding
from serve_app.gateway.errors import MOST_SHOWN, from_validation
from serve_app.gateway.forms import multipart_form
from serve_app.gateway.image_request import ImageEditRequest, ImageGenerationRequest
from serve_app.gateway.openai_fields import REJECTED

MOST_NAMED = 8
"""Query parameters that a warning names."""
_FILES = ("image", "mask")


async def read_generation(request: Request) -> ImageGenerationRequest:
    """Parse the JSON body. The content type is ignored: `curl -d` sends that of a form.

    Raises:
        InvalidRequest: naming the field and what is allowed.
        UnsupportedEncoding: the body is compressed.
    """
    _reject_compressed(request)
    content = await request.body()
    try:
        body = ImageGenerationRequest.model_validate_json(content)
    except ValidationError as error:
        raise from_validation(error, ImageGenerationRequest) from None
    json.loads(content, object_pairs_hook=_each_once)  # pydantic takes the last of equal keys
    return body


@dataclass(frozen=True)
class EditForm:
    """A multipart body. Its images are not yet decoded."""

    fields: ImageEditRequest
    image: bytes
    mask: bytes | None


async def read_edit(request: Request) -> EditForm:
    """Parse the multipart body.

    Lists and objects may come in brackets, as OpenAI's clients send them.

    Raises:
        InvalidRequest: naming the field and what is allowed.
        UnsupportedEncoding: the body is compressed.
    """
    _reject_compressed(request)
    given, options = parse_options_header(request.headers.get("content-type"))
    kind = given.decode("latin-1").lower()
    if kind != "multipart/form-data":
        raise InvalidRequest(
            f"the body must be multipart/form-data, not {kind[:100] or 'without a content type'}."
        )
    # Starlette would decode by any codec of Python's, some of which raise on every input.
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8"):
        raise InvalidRequest(f"the body must be in UTF-8, not {charset[:100]!r}.")
    texts: dict[str, object] = {}
    files: dict[str, bytes] = {}
    async with multipart_form(request) as form:
        for name, value in form.multi_items():
            field = name.removesuffix("[]")
            shown = field[:MOST_SHOWN]
            if field in REJECTED:
                raise InvalidRequest(f"{field}: {REJECTED[field]}", field)
            if isinstance(value, UploadFile) != (field in _FILES):
                wanted = "a file" if field in _FILES else "text"
                raise InvalidRequest(f"{shown} must be {wanted}.", shown)
            if field == "image" and field in files:
                raise InvalidRequest("image is given twice; an edit has one input image.", field)
            if field in files or field in texts:
                raise InvalidRequest(f"{shown} is given twice; send it once.", shown)
            if isinstance(value, UploadFile):
                files[field] = await value.read()
            else:
                _add(texts, field, value)
    if "image" not in files:
        raise InvalidRequest("the file 'image' is required.", "image")
    try:
        fields = ImageEditRequest.model_validate_strings(texts, strict=False)
    except ValidationError as error:
        raise from_validation(error, ImageEditRequest) from None
    return EditForm(fields, files["image"], files.get("mask"))


def query_warnings(request: Request) -> list[str]:
    """Warn of query parameters, which no endpoint of images reads."""
    names = [repr(name[:MOST_SHOWN]) for name in dict.fromkeys(request.query_params.keys())]
    if not names:
        return []
    shown = ", ".join(names[:MOST_NAMED]) + (", …" if len(names) > MOST_NAMED else "")
    return [f"query parameters have no effect: {shown}. Send fields in the body."]


def _reject_compressed(request: Request) -> None:
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
