"""Reads the bodies of the image endpoints. Not by FastAPI, whose errors are not OpenAI's."""

import json
from dataclasses import dataclass

from fastapi import Request
from pydantic import ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile

from serve_app.errors import InvalidRequest
from serve_app.gateway.errors import MOST_SHOWN, from_validation
from serve_app.gateway.schemas import ImageEditRequest, ImageGenerationRequest

MAX_FIELDS = 64
_FILES = ("image", "mask")


async def read_generation(request: Request) -> ImageGenerationRequest:
    """The JSON body, whatever its content type: `curl -d` calls it a form.

    Raises:
        InvalidRequest: naming the field and what is allowed.
    """
    try:
        return ImageGenerationRequest.model_validate_json(await request.body())
    except ValidationError as error:
        raise from_validation(error, ImageGenerationRequest) from None


@dataclass(frozen=True)
class EditForm:
    """A multipart body, its pictures not yet decoded."""

    fields: ImageEditRequest
    image: bytes
    mask: bytes | None


async def read_edit(request: Request) -> EditForm:
    """The multipart body; lists and objects may come in brackets, as OpenAI's clients send them.

    Raises:
        InvalidRequest: naming the field and what is allowed.
    """
    given, options = parse_options_header(request.headers.get("content-type"))
    kind = given.decode("latin-1").lower()
    if kind != "multipart/form-data":
        raise InvalidRequest(
            f"the body must be multipart/form-data, not {kind[:100] or 'without a content type'}."
        )
    # Starlette would decode by any codec of Python's, some of which raise whatever they are given.
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8"):
        raise InvalidRequest(f"the body must be in UTF-8, not {charset[:100]!r}.")
    texts: dict[str, object] = {}
    files: dict[str, bytes] = {}
    async with request.form(max_files=len(_FILES) + 1, max_fields=MAX_FIELDS) as form:
        for name, value in form.multi_items():
            field = name.removesuffix("[]")
            shown = field[:MOST_SHOWN]
            if isinstance(value, UploadFile) != (field in _FILES):
                wanted = "a file" if field in _FILES else "text"
                raise InvalidRequest(f"{shown} must be {wanted}.", shown)
            if field in files or field in texts:
                raise InvalidRequest(f"{shown} is given twice; one is taken.", shown)
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


def _add(texts: dict[str, object], field: str, value: str) -> None:
    """``lora[ink]=0.5`` becomes an entry of the object ``lora``; so does one written as JSON."""
    name, bracket, key = field.partition("[")
    if bracket and key.endswith("]"):
        within = texts.setdefault(name, {})
        if not isinstance(within, dict) or key[:-1] in within:
            raise InvalidRequest(f"{name[:MOST_SHOWN]} is given twice.", name[:MOST_SHOWN])
        within[key[:-1]] = value
    elif field == "lora" and value.startswith("{"):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{field} is not JSON: {error}", field) from None
        texts[field] = {key: str(scale) for key, scale in parsed.items()}
    else:
        texts[field] = value
