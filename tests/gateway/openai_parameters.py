"""The parameters of OpenAI's Python client, and the table of docs/guide/openai.md about them."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, NotRequired, Required, Union, get_args, get_origin, get_type_hints

from openai.resources.images import Images
from openai.types import image_edit_params, image_generate_params

from tests.docs.pages import rendered

Method = Literal["generate", "edit"]

_TYPES: dict[Method, tuple[Any, ...]] = {
    "generate": (
        image_generate_params.ImageGenerateParamsStreaming,
        image_generate_params.ImageGenerateParamsNonStreaming,
    ),
    "edit": (
        image_edit_params.ImageEditParamsStreaming,
        image_edit_params.ImageEditParamsNonStreaming,
    ),
}

_OF_THE_TRANSPORT = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
"""Arguments of the client that are no parameters of OpenAI's API."""


@dataclass
class Parameter:
    """A parameter of a method, from both its signature and its typed dictionaries."""

    name: str
    literals: set[str] = field(default_factory=set)
    """Values that its type lists, as in JSON."""
    takes_others: bool = False
    """True if its type also allows other values: any text, a number, a file, an object."""
    takes_null: bool = False

    def add(self, hint: Any) -> None:
        """Add the values of a type hint."""
        origin = get_origin(hint)
        if origin in (Union, UnionType, Required, NotRequired):
            for member in get_args(hint):
                self.add(member)
        elif origin is Literal:
            self.literals |= {
                str(value).lower() if isinstance(value, bool) else value for value in get_args(hint)
            }
        elif hint is type(None):
            self.takes_null = True
        elif getattr(hint, "__name__", "") != "Omit":
            self.takes_others = True


def parameters_of(method: Method) -> dict[str, Parameter]:
    """Return the parameters of a method by name."""
    found: dict[str, Parameter] = {}
    sources: list[Mapping[str, Any]] = [
        get_type_hints(kind, include_extras=True) for kind in _TYPES[method]
    ]
    function = inspect.unwrap(getattr(Images, method))
    hints = get_type_hints(function, include_extras=True)
    sources.append({name: hints.get(name) for name in inspect.signature(function).parameters})
    for source in sources:
        for name, hint in source.items():
            if name not in _OF_THE_TRANSPORT:
                found.setdefault(name, Parameter(name)).add(hint)
    return found


@dataclass(frozen=True)
class Row:
    """A row of the table: what becomes of some values of a parameter."""

    parameter: str
    literals: frozenset[str]
    """Values in the row, each in backticks of its own."""
    kinds: frozenset[str]
    """Descriptions of other values in the row."""
    results: Mapping[Method, str]


def documented_rows() -> list[Row]:
    """Read the table of the page."""
    lines = [line for line in rendered("guide/openai").splitlines() if line.startswith("|")]
    header, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert header[:4] == ["parameter", "value", "generate", "edit"]
    return [_row(*cells[:4]) for cells in body]


def _row(name: str, values: str, generate: str, edit: str) -> Row:
    each = [value.strip() for value in values.split(",")]
    literals = frozenset(value[1:-1] for value in each if re.fullmatch(r"`[^`]+`", value))
    kinds = frozenset(value for value in each if value[1:-1] not in literals)
    return Row(name[1:-1], literals, kinds, {"generate": generate, "edit": edit})
