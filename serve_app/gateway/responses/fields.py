"""The body of a request, and what becomes of fields that this server does not have.

No language model is here. A field that tells one how to write has no effect, and a warning names
it. A field by which the image would depend on more than this request is rejected.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serve_app.config.gateway import UnknownFields
from serve_app.errors import InvalidRequest
from serve_app.gateway.errors import MOST_SHOWN, from_validation

IMAGE_TOOL = "image_generation"

REJECTED = {
    "background": "requests run while their client waits; leave it out, and use stream.",
    "conversation": "the server keeps no conversations; send all of the request in input.",
    "moderation": "there is no moderation model; the operator can set gateway.safety.",
    "previous_response_id": "the server stores no responses; send the image in input, as an "
    "input_image with a data URL, to edit it.",
    "prompt": "the server stores no prompt templates; send the text in input.",
}
"""Fields that are rejected unless they are null or false, with the remedy."""

WITHOUT_EFFECT = frozenset(
    {
        "access_programs",
        "background_options",
        "context_management",
        "image",
        "include",
        "instructions",
        "max_output_tokens",
        "max_tool_calls",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning",
        "service_tier",
        "store",
        "stream_options",
        "temperature",
        "text",
        "top_logprobs",
        "top_p",
        "truncation",
    }
)
"""Fields for a language model, or for storage, that are accepted."""


class ResponsesRequest(BaseModel):
    """Fields with an effect. The others are checked by name."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    input: str | list[dict[str, Any]] = Field(
        description="Description of the image: text, or messages of the user with parts "
        "`input_text` and `input_image`, which is then edited. It is the prompt as it "
        "stands. Messages of the roles `system` and `developer` have no effect.",
        examples=["a red circle on a blue background"],
    )
    model: str | None = Field(
        None,
        description="Name of the model, from /v1/models, or one of the server's aliases. Default: "
        "the first model.",
        examples=["demo"],
    )
    tools: list[dict[str, Any]] = Field(
        [],
        description="One tool `image_generation`, with OpenAI's fields and those of "
        "/v1/images/generations, such as `seed`. Other tools are accepted only if `tool_choice` is "
        "the image tool.",
        examples=[[{"type": IMAGE_TOOL}]],
    )
    tool_choice: str | dict[str, Any] = Field(
        "auto", description="`auto` or `required`, or the image tool. They have the same effect."
    )
    stream: bool = Field(False, description="Respond with server-sent events.")
    metadata: dict[str, str] = Field({}, description="Repeated in the response.", max_length=16)
    safety_identifier: str | None = Field(
        None, max_length=512, description="As in /v1/images/generations."
    )
    user: str | None = Field(None, max_length=512, description="As in /v1/images/generations.")

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None or name == "input"}

    def check(self, unknown_fields: UnknownFields) -> list[str]:
        """Return warnings of fields without effect.

        Raises:
            InvalidRequest: a field cannot be honoured.
        """
        extra = self.model_extra or {}
        for name, reason in REJECTED.items():
            if extra.get(name, False) is not False:
                raise InvalidRequest(f"{name}: {reason}", name)
        text = extra.get("text")
        wanted = text.get("format") if isinstance(text, dict) else None
        if wanted is not None and wanted != {"type": "text"}:
            raise InvalidRequest(
                "text.format: the output is an image, without text; leave it out.", "text.format"
            )
        strays = [name for name in extra if name not in WITHOUT_EFFECT | REJECTED.keys()]
        check_strays(strays, "", unknown_fields, tuple(type(self).model_fields))
        return without_effect([name for name in extra if name not in REJECTED])


class Message(BaseModel):
    """A message of ``input``."""

    model_config = ConfigDict(strict=True)

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[dict[str, Any]]


class TextPart(BaseModel):
    """A text in a message."""

    model_config = ConfigDict(strict=True)

    text: str


class ImagePart(BaseModel):
    """An image in a message, or a mask."""

    model_config = ConfigDict(strict=True)

    image_url: str | None = None
    file_id: str | None = None


def parsed(part: Any, model: type[Message | TextPart | ImagePart], where: str) -> Any:
    """Parse a part of the body.

    Raises:
        InvalidRequest: naming the field by its path, such as ``input.0.content``.
    """
    try:
        return model.model_validate(part)
    except ValidationError as error:
        found = from_validation(error, model)
        param = f"{where}.{found.param}" if found.param else where
        raise InvalidRequest(f"{where}: {found.message}", param) from None


def check_strays(
    names: list[str], where: str, unknown_fields: UnknownFields, known: tuple[str, ...]
) -> None:
    """Reject unknown fields, unless the configuration ignores them.

    Raises:
        InvalidRequest: naming the first one.
    """
    if names and unknown_fields == "reject":
        shown = f"{where}{names[0]}"[:MOST_SHOWN]
        raise InvalidRequest(f"unknown field {shown!r}; known are {', '.join(known)}.", shown)


def without_effect(names: list[str]) -> list[str]:
    """Return a warning that names fields; none without any."""
    shown = ", ".join(names)
    return [f"fields without effect here: {shown[:500]}."] if names else []


def kind_of(part: Mapping[str, Any], default: str = "") -> str:
    """Return the type of a tool, an item or a part of a message, as errors may show it."""
    kind = part.get("type", default)
    return kind[:MOST_SHOWN] if isinstance(kind, str) else ""
