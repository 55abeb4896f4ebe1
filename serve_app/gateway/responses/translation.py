"""From a body of this API to a request of the images API, and errors back to the names here."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from serve_app.config.gateway import UnknownFields
from serve_app.errors import InvalidRequest
from serve_app.gateway.data_urls import check_data_url, file_of
from serve_app.gateway.errors import from_validation
from serve_app.gateway.image_request import ImageEditRequest
from serve_app.gateway.openai_fields import REJECTED
from serve_app.gateway.responses.fields import (
    IMAGE_TOOL,
    ImagePart,
    Message,
    ResponsesRequest,
    TextPart,
    check_strays,
    kind_of,
    parsed,
    without_effect,
)

MASK = "input_image_mask"

OF_THE_REQUEST = frozenset(
    {"n", "progress", "prompt", "response_format", "safety_identifier", "stream", "user"}
)
"""Fields of the images API that are set for the whole request, or not at all."""

TOOL_FIELDS = frozenset(ImageEditRequest.model_fields) - OF_THE_REQUEST

_NAMES = {"prompt": "input", "image": "input"}
"""Names here of fields that errors name. Most others are the tool's."""

Action = Literal["generate", "edit"]


@dataclass(frozen=True)
class Translation:
    """A request of the images API. Its files are not yet decoded."""

    body: ImageEditRequest
    action: Action
    image_urls: tuple[str, ...]
    mask_url: str | None
    tool: dict[str, Any]
    """The image tool as it was sent, without the mask."""
    where: str
    """Path of the image tool in the request."""
    tool_choice: str | dict[str, str]
    warnings: tuple[str, ...]

    def files(self) -> tuple[list[bytes], bytes | None]:
        """Decode the files of the images and of the mask.

        Raises:
            InvalidRequest: one is no base64.
        """
        images = [file_of(url, "input") for url in self.image_urls]
        mask = None
        if self.mask_url is not None:
            mask = file_of(self.mask_url, f"{self.where}.{MASK}.image_url")
        return images, mask

    @contextmanager
    def renamed(self) -> Iterator[None]:
        """Name the field of an error as this API does. For calls that know the other's names."""
        with _renamed(self.where):
            yield


@dataclass(frozen=True)
class _Input:
    prompt: str
    image_urls: tuple[str, ...]
    warnings: tuple[str, ...]


def translate(given: ResponsesRequest, unknown_fields: UnknownFields) -> Translation:
    """Translate a body.

    Raises:
        InvalidRequest: a field cannot be honoured.
    """
    warnings = given.check(unknown_fields)
    forced = _is_forced(given.tool_choice)
    index, about_tools = _image_tool(given.tools, forced)
    where = f"tools.{index}"
    tool = {name: value for name, value in given.tools[index].items() if value is not None}
    mask = tool.pop(MASK, None)
    mask_url = None if mask is None else _url_of(mask, f"{where}.{MASK}")
    read = _read_input(given.input)
    action = _action(tool.get("action", "auto"), bool(read.image_urls), where)
    if action == "generate":
        for name, present in ((MASK, mask is not None), ("strength", "strength" in tool)):
            if present:
                raise InvalidRequest(
                    f"{where}.{name} is for edits: send an input_image with the user's message.",
                    f"{where}.{name}",
                )
    fields = {name: value for name, value in tool.items() if name not in ("type", "action")}
    strays = [name for name in fields if name not in TOOL_FIELDS]
    for name in strays:
        if name in REJECTED:
            raise InvalidRequest(f"{where}.{name}: {REJECTED[name]}", f"{where}.{name}")
    check_strays(strays, f"{where}.", unknown_fields, ("action", MASK, *sorted(TOOL_FIELDS)))
    known = {name: value for name, value in fields.items() if name in TOOL_FIELDS}
    whole = {"prompt": read.prompt, "stream": given.stream, "response_format": "b64_json"}
    whole |= {"safety_identifier": given.safety_identifier, "user": given.user}
    with _renamed(where):
        try:
            body = ImageEditRequest.model_validate(known | whole)
        except ValidationError as error:
            raise from_validation(error, ImageEditRequest) from None
    if body.partial_images and not given.stream:
        body = body.model_copy(update={"partial_images": 0})
        warnings.append(f"{where}.partial_images has no effect: only a stream has previews.")
    return Translation(
        body,
        action,
        read.image_urls,
        mask_url,
        tool,
        where,
        {"type": IMAGE_TOOL} if forced else str(given.tool_choice),
        (
            *warnings,
            *about_tools,
            *without_effect([f"{where}.{name}" for name in strays]),
            *read.warnings,
        ),
    )


def _is_forced(choice: str | dict[str, Any]) -> bool:
    """Return whether the image tool is the only one that may be called."""
    if choice in ("auto", "required"):
        return False
    if isinstance(choice, dict):
        if kind_of(choice) == IMAGE_TOOL:
            return True
        allowed = choice.get("tools")
        if kind_of(choice) == "allowed_tools" and isinstance(allowed, list):
            kinds = {kind_of(tool) for tool in allowed if isinstance(tool, dict)}
            if IMAGE_TOOL in kinds:
                return kinds == {IMAGE_TOOL}
    raise InvalidRequest(
        "tool_choice must allow the image tool, the only one here. Send 'auto', 'required' or "
        f'{{"type": "{IMAGE_TOOL}"}}.',
        "tool_choice",
    )


def _image_tool(tools: list[dict[str, Any]], forced: bool) -> tuple[int, list[str]]:
    """Return the place of the image tool, and a warning of others."""
    found = [index for index, tool in enumerate(tools) if kind_of(tool) == IMAGE_TOOL]
    if len(found) != 1:
        problem = "is given twice" if found else "is missing: there is no language model here"
        raise InvalidRequest(
            f'tools: the image tool {problem}. Send one {{"type": "{IMAGE_TOOL}"}}.', "tools"
        )
    others = [index for index in range(len(tools)) if index not in found]
    if others and not forced:
        where = f"tools.{others[0]}"
        raise InvalidRequest(
            f"{where} is a {kind_of(tools[others[0]])!r}, and no language model is here to call "
            f'it. Leave it out, or set tool_choice to {{"type": "{IMAGE_TOOL}"}}.',
            where,
        )
    return found[0], without_effect([f"tools.{index}" for index in others])


def _action(action: Any, has_image: bool, where: str) -> Action:
    if action not in ("auto", "generate", "edit"):
        problem = "must be auto, generate or edit."
    elif action == "edit" and not has_image:
        problem = "is edit: send an input_image with the user's message."
    elif action == "generate" and has_image:
        problem = "is generate, and an input_image can only be edited; leave one of them out."
    else:
        return "edit" if has_image else "generate"
    raise InvalidRequest(f"{where}.action {problem}", f"{where}.action")


def _read_input(given: str | list[dict[str, Any]]) -> _Input:
    """Read the text and the image of the user's messages.

    Raises:
        InvalidRequest: there is more than a language model could leave out.
    """
    if isinstance(given, str):
        return _Input(given, (), ())
    texts: list[str] = []
    urls: list[str] = []
    ignored: dict[str, None] = {}
    for index, item in enumerate(given):
        where = f"input.{index}"
        if (kind := kind_of(item, "message")) != "message":
            raise _conversation(where, kind)
        message = parsed(item, Message, where)
        if message.role == "assistant":
            raise _conversation(where, "message of the assistant")
        if message.role != "user":
            ignored[message.role] = None
        elif isinstance(message.content, str):
            texts.append(message.content)
        else:
            for number, part in enumerate(message.content):
                _read_part(part, f"{where}.content.{number}", texts, urls)
    if not texts:
        raise InvalidRequest("input has no text of the user: describe the image.", "input")
    roles = " and ".join(ignored)
    warnings = (f"messages of the role {roles} have no effect.",) if ignored else ()
    return _Input("\n".join(texts), tuple(urls), warnings)


def _read_part(part: dict[str, Any], where: str, texts: list[str], urls: list[str]) -> None:
    match kind_of(part):
        case "input_text":
            texts.append(parsed(part, TextPart, where).text)
        case "input_image":
            urls.append(_url_of(part, where))
        case kind:
            raise InvalidRequest(
                f"{where}.type must be input_text or input_image, not {kind!r}.", f"{where}.type"
            )


def _url_of(part: Any, where: str) -> str:
    """Return the data URL of an image."""
    read = parsed(part, ImagePart, where)
    if read.file_id is not None:
        raise InvalidRequest(
            f"{where}.file_id: the server stores no files; send image_url with a data URL.",
            f"{where}.file_id",
        )
    url: str = read.image_url or ""
    check_data_url(url, f"{where}.image_url")
    return url


def _conversation(where: str, what: str) -> InvalidRequest:
    return InvalidRequest(
        f"{where} is a {what!r}, and no language model is here to read a conversation. Send "
        "messages of the user only, which describe the whole image.",
        where,
    )


@contextmanager
def _renamed(where: str) -> Iterator[None]:
    try:
        yield
    except InvalidRequest as error:
        param = error.param
        if param is None:
            raise
        if param == "mask":
            name = f"{where}.{MASK}"
        elif param in _NAMES or param in OF_THE_REQUEST:
            name = _NAMES.get(param, param)
        else:
            name = f"{where}.{param}"
        message = re.sub(rf"^{re.escape(param)}\b", name, error.message)
        raise type(error)(message, name) from error
