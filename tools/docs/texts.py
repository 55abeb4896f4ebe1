"""The texts that a user reads, from every file and interface of the project."""

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple, cast

import typer.main
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOTS = (
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
    *("docs", ".github", "cluster", "configs", "images", "monitoring", "serve_app", "tools"),
)
"""Files and folders with texts."""


class Text(NamedTuple):
    """A paragraph, a heading, a cell, a message, …: sentences that belong together.

    Code is in backticks, and a value that is not known is in braces. ``line`` is that of the first
    line in the file ``source``; None if ``source`` describes another place.
    """

    content: str
    source: str
    line: int | None = None


Reader = Callable[[str, str], Iterator[Text]]
"""Finds the texts in the content of a file, given also its name."""


def texts(paths: Sequence[Path] = ()) -> Iterator[Text]:
    """Collect the texts of files in the paths, and of interfaces that are built of them."""
    paths = [path.resolve() for path in paths or [Path(root) for root in ROOTS]]
    here = Path.cwd()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if reader := _reader(file):
                source = file.relative_to(here) if file.is_relative_to(here) else file
                yield from reader(file.read_text(encoding="utf-8"), str(source))
    for owner, interface in INTERFACES.items():
        folder = here / owner
        if any(path.is_relative_to(folder) or folder.is_relative_to(path) for path in paths):
            yield from interface()


def _reader(file: Path) -> Reader | None:
    if file.suffix == ".py" and "monitoring" in file.parts:
        return None  # its strings are queries; the dashboards are an interface
    return READERS.get(file.suffix or file.name)


# Markdown

_MACRO = re.compile(r"\{\{.*?\}\}", re.DOTALL)
_TAG = re.compile(r"<!--.*?-->|<[^>]+>|\{%.*?%\}|\{:[^}]*\}", re.DOTALL)
_ADMONITION = re.compile(r"^([ ]*)(?:!!!|\?\?\?\+?|===)(?: [\w ]+)?(?: \"(.*)\")?$", re.MULTILINE)
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_GENERATED = re.compile(r"^:::.*\n(?:(?: {4}.*)?\n)*", re.MULTILINE)

_MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"]).disable("code")
"""Indented text is part of an admonition, not code."""


def _newlines(match: re.Match[str]) -> str:
    return "\n" * match[0].count("\n")


def markdown(document: str, source: str) -> Iterator[Text]:
    """Yield the paragraphs, headings, items and cells of a document for mkdocs or GitHub."""
    document = _FRONT_MATTER.sub(_newlines, document)
    document = _GENERATED.sub(_newlines, document)
    document = _MACRO.sub(lambda match: "{…}" + _newlines(match), document)
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
        blank = len(content) - len(content.lstrip())
        yield Text(content.strip(), source, line + 1 + content.count("\n", 0, blank))


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


# YAML: comments, and the values of some keys

_COMMENT = re.compile(r"""^((?:[^#"']|"[^"]*"|'[^']*')*?)(?:(?<=\s)|^)#(.*)$""")
_COMMENTED_OUT = re.compile(r"^ {3,}|^\s*(- )?[\w./-]+:( \S+){0,2}$")
_PROSE_KEYS = {"summary", "description", "about", "placeholder"}
_FORM_KEYS = {"label", "value", "title", "name"}


def yaml_file(document: str, source: str) -> Iterator[Text]:
    """Yield comments, the annotations of alerts, and the texts of GitHub's forms."""
    yield from comments(document, source)
    keys = _PROSE_KEYS | (_FORM_KEYS if ".github" in source else set())
    for root in yaml.compose_all(document, yaml.SafeLoader):
        for key, value in _pairs(root):
            if key.value in keys and isinstance(value, yaml.ScalarNode):
                content = _MACRO.sub("{…}", value.value)
                yield Text(content, source, value.start_mark.line + 1 + (value.style in ("|", ">")))


def _pairs(node: yaml.Node | None) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key, value
            yield from _pairs(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _pairs(value)


def comments(document: str, source: str) -> Iterator[Text]:
    """Yield the paragraphs of comments; indented lines in them, and keys, are code."""
    paragraph: list[str] = []
    for number, line in enumerate([*document.splitlines(), ""], start=1):
        match = _COMMENT.match(line)
        before, comment = (match[1].strip(), match[2]) if match else ("", "")
        code = bool(_COMMENTED_OUT.match(comment))
        item = comment.lstrip().startswith("- ")
        if paragraph and (before or code or item or not comment.strip()):
            yield Text("\n".join(paragraph), source, number - len(paragraph))
            paragraph = []
        if before:
            yield Text(comment.strip(), source, number)
        elif comment.strip() and not code:
            paragraph.append(comment.strip())


# Python and JavaScript: literals of several words

_JS_STRING = re.compile(r"""//[^\n]*|("(?:[^"\\\n]|\\.)*"|`(?:[^`\\]|\\.)*`)""")
_JS_FIELD = re.compile(r"\$\{[^{}]*\}")
_FEWEST_WORDS = 3


def python(document: str, source: str) -> Iterator[Text]:
    """Yield the literals that may be prose: messages, advice, descriptions. No docstrings."""
    tree = ast.parse(document)
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        literal = _literal(node) if isinstance(node, ast.expr) else None
        if literal is None:
            nodes += ast.iter_child_nodes(node)
        elif len(literal.split()) >= _FEWEST_WORDS and isinstance(node, ast.expr):
            yield from _message(literal, source, node.lineno)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            nodes.remove(node.value)  # a docstring


def _literal(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(_literal(value) or _field(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _literal(node.left), _literal(node.right)
        if left is not None or right is not None:
            return (left or _field(node.left)) + (right or _field(node.right))
    return None


def _field(node: ast.expr) -> str:
    value = node.value if isinstance(node, ast.FormattedValue) else node
    return "{" + re.sub(r"[{}`]", "", ast.unparse(value)) + "}"


def _message(message: str, source: str, line: int) -> Iterator[Text]:
    """Split a message into its lines. An indented line is a command, or a piece of YAML."""
    first, *others = message.split("\n")
    for part in (first, *(other for other in others if not other.startswith(" "))):
        yield Text(part.strip(), source, line)


def javascript(document: str, source: str) -> Iterator[Text]:
    """Yield the literals that may be prose."""
    for match in _JS_STRING.finditer(document):
        literal = _JS_FIELD.sub("{…}", (match[1] or "")[1:-1])
        if len(literal.split()) >= _FEWEST_WORDS:
            yield Text(literal, source, document.count("\n", 0, match.start()) + 1)


# HTML

_INSIDE_A_LINE = {"a", "kbd", "output", "span", "b", "i", "em", "strong", "code"}
_READ_ALOUD = {"alt", "aria-label", "placeholder", "title"}


class _Page(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.texts: list[Text] = []
        self._parts: list[str] = []
        self._line = 1
        self._skipped = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._boundary(tag)
        self._skipped = tag in ("script", "style")
        for name, value in attrs:
            if name in _READ_ALOUD and value:
                self.texts.append(Text(value, self.source, self.getpos()[0]))

    def handle_endtag(self, tag: str) -> None:
        self._boundary(tag)
        self._skipped = False

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self._parts.append(data)

    def _boundary(self, tag: str) -> None:
        if tag not in _INSIDE_A_LINE:
            if content := "".join(self._parts).strip():
                self.texts.append(Text(content, self.source, self._line))
            self._parts = []
            self._line = self.getpos()[0]


def html(document: str, source: str) -> Iterator[Text]:
    """Yield what a page shows, and what a screen reader reads."""
    page = _Page(source)
    page.feed(document)
    yield from page.texts


# Interfaces


def command_line() -> Iterator[Text]:
    """Yield the ``--help`` texts of all commands."""
    from serve_app.cli import cli

    return _help(typer.main.get_command(cli), "diffusion-serve")


def _help(command: Any, name: str) -> Iterator[Text]:
    for paragraph in (command.help or "").split("\n\n"):
        yield Text(paragraph, f"help of {name}")
    for param in command.params:
        yield Text(getattr(param, "help", "") or "", f"help of {name} {param.opts[0]}")
    for child, inner in getattr(command, "commands", {}).items():
        yield from _help(inner, f"{name} {child}")


def settings() -> Iterator[Text]:
    """Yield the descriptions of the configuration's fields."""
    from serve_app.config.models import AppConfig

    return _described(AppConfig.model_json_schema(), "AppConfig")


def http_api() -> Iterator[Text]:
    """Yield the descriptions of endpoints, fields and answers in the OpenAPI document."""
    from serve_app.config.models import AppConfig
    from serve_app.gateway.auth import KeyRing
    from serve_app.gateway.routes import create_api
    from serve_app.protocol.backend import GenerationBackend

    backend = cast(GenerationBackend, None)  # no request reaches it
    api = create_api(AppConfig(), backend, KeyRing(None, None))
    return _described(api.openapi(), "OpenAPI")


def dashboards() -> Iterator[Text]:
    """Yield the titles and descriptions of Grafana's dashboards."""
    from monitoring.dashboards import DASHBOARDS, grafana

    for dashboard in DASHBOARDS:
        yield from _described(grafana(dashboard), f"dashboard {dashboard.name}")


def _described(value: Any, source: str) -> Iterator[Text]:
    """Yield the titles and descriptions in a JSON document, with their paths."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("title", "description", "summary") and isinstance(inner, str):
                for paragraph in inner.split("\n\n"):
                    yield Text(paragraph, source)
            else:
                yield from _described(inner, f"{source}.{key}")


READERS: dict[str, Reader] = {
    ".md": markdown,
    ".yaml": yaml_file,
    ".yml": yaml_file,
    ".py": python,
    ".js": javascript,
    ".html": html,
    "Dockerfile": comments,
}
"""By suffix, or by name."""

INTERFACES: dict[str, Callable[[], Iterator[Text]]] = {
    "serve_app/cli": command_line,
    "serve_app/config": settings,
    "serve_app/gateway": http_api,
    "monitoring": dashboards,
}
"""By the folder that most of their texts are in."""
