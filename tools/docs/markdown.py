"""Pieces of Markdown that generated pages and tables share."""

import re
from collections.abc import Iterable, Sequence


def cell(text: str) -> str:
    """Return a text as one line that may stand in a table. Spaces without a break stay."""
    return re.sub(r"\s+", " ", text, flags=re.ASCII).strip().replace("|", "\\|")


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; ``rows`` have one text for each header."""
    lines = [headers, ["---"] * len(headers), *([cell(one) for one in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(value: object) -> str:
    """Return a value in the type of code."""
    return f"`{value}`"


_CODE = re.compile(
    r"(?<!\w)'([^'\s]+)'(?!\w)"  # a value in quotes
    r"|(?<![\w.])((?:model|engine|gateway|autoscaling_config)\.[a-z_]+(?:\.[a-z_]+)*)"  # a key
    r"|(?<![\w.])([A-Z]+(?:_[A-Z]+)+)\b"  # an environment variable
)


def named(text: str) -> str:
    """Set quoted values, keys and environment variables of a description in the type of code."""
    pieces = text.split("`")
    for number in range(0, len(pieces), 2):  # the others are code already
        pieces[number] = _CODE.sub(lambda found: code(found[found.lastindex or 0]), pieces[number])
    return "`".join(pieces)


def prose(text: str) -> str:
    """Convert a docstring's double backticks to Markdown's, and its paragraphs to lines."""
    paragraphs = text.strip().split("\n\n")
    joined = "\n\n".join(re.sub(r"\s*\n\s*", " ", one) for one in paragraphs)
    return joined.replace("``", "`")
