"""The texts that a user reads, from every file and interface of the project."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token


class Text(NamedTuple):
    """A paragraph, a heading, a cell, a message, …: sentences that belong together.

    Code is in backticks. ``line`` is that of its first line in the file ``source``; ``None`` if
    ``source`` describes another place.
    """

    content: str
    source: str
    line: int | None = None


def texts(paths: Sequence[Path] = ()) -> Iterator[Text]:
    """Collect the texts below the paths, or all of them."""
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix == ".md":
                yield from markdown(file.read_text(encoding="utf-8"), str(file))


_MACRO = re.compile(r"\{\{.*?\}\}", re.DOTALL)
_TAG = re.compile(r"<!--.*?-->|<[^>]+>|\{%.*?%\}|\{:[^}]*\}", re.DOTALL)
_ADMONITION = re.compile(
    r"^(\s*)(?:!!!|\?\?\?\+?|===\+?)(?: [\w ]+)?(?: \"(.*)\")?\s*$", re.MULTILINE
)
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_GENERATED = re.compile(r"^:::.*\n(?:(?: {4}.*)?\n)*", re.MULTILINE)

_MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"]).disable("code")
"""Indented text is an admonition's, not code."""


def _newlines(match: re.Match[str]) -> str:
    return "\n" * match[0].count("\n")


def markdown(document: str, source: str) -> Iterator[Text]:
    """Yield the paragraphs, headings, items and cells of a document for mkdocs or GitHub."""
    document = _FRONT_MATTER.sub(_newlines, document)
    document = _GENERATED.sub(_newlines, document)
    document = _MACRO.sub(lambda match: "MACRO" + _newlines(match), document)
    document = _ADMONITION.sub(r"\1# \2", document)
    line = 0
    for token in _MARKDOWN.parse(document):
        line = token.map[0] if token.map else line
        if token.type == "inline":
            content = "".join(_inline(token.children or []))
        elif token.type == "html_block":
            content = token.content
        else:
            continue
        content = _TAG.sub(_newlines, content)
        lead = len(content) - len(content.lstrip())
        yield Text(content.strip(), source, line + 1 + content.count("\n", 0, lead))


def _inline(tokens: Sequence[Token]) -> Iterator[str]:
    for token in tokens:
        if token.type == "code_inline":
            yield f"`{token.content.replace('`', ' ')}`"
        elif token.type in ("softbreak", "hardbreak"):
            yield "\n"
        elif token.type == "image":
            yield from _inline(token.children or [])
        elif token.type == "text":
            yield token.content
