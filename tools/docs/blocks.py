"""Fenced blocks of the documents, and what becomes of each: ``python -m tools.docs.blocks``.

A marker is an HTML comment, alone on the line directly before the fence:

``<!-- server -->``
    The block starts a server, which runs until the end of the page or the next such block.
``<!-- not run: REASON -->``
    No test runs the block; `REASONS` has the reasons.
``<!-- needs: server -->``
    Once on a page: its blocks send requests to a demo server that runs elsewhere.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import dedent

from jinja2 import Environment, StrictUndefined

from tools.docs.macros import define_env

ROOT = Path(__file__).parents[2]

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/**/*.md",
    "cluster/**/README.md",
    "images/README.md",
    "serve_app/demo/model/README.md",
)

RUN = ("sh", "python")
PARSED = ("yaml", "json")
OTHER_NAMES = {
    **dict.fromkeys(("bash", "shell", "console", "zsh", "shell-session"), "sh"),
    **dict.fromkeys(("py", "python3", "pycon"), "python"),
    "yml": "yaml",
    "txt": "text",
}
"""Names of languages under which a block would escape its test, and the name to write."""

REASONS = (
    "needs a GPU",
    "needs a Kubernetes cluster",
    "needs Docker",
    "needs the Hugging Face hub",
    "installs packages",
    "needs root",
    "runs for minutes",
    "is part of another program",
)
RUN_BY = "is run by "
"""Begins one more reason; the path of a test file ends it."""

NOT_RUN = "not run: "
SERVER = "server"
NEEDS_SERVER = "needs: server"
TESTS = "tests/docs/test_blocks.py"

_COMMENT = re.compile(r"\s*<!--(.*?)-->\s*")
_OPENING = re.compile(r"(?P<indent>\s*(?:(?:[-*+]|\d+[.)])\s+)*)(?P<fence>`{3,}|~{3,})(?P<info>.*)")
_LANGUAGE = re.compile(r"\{?\s*\.?([A-Za-z][\w+-]*)")
_RAW = re.compile(r"\{%-?\s*raw\s*-?%\}(.*?)\{%-?\s*endraw\s*-?%\}", re.DOTALL)
_SET = re.compile(r"\{%-?\s*set\s[^%]*%\}")
_SIGNS = "{}%#"
_HIDDEN = "\ue000\ue001\ue002\ue003"
"""Stand-ins for the signs of raw regions, while Jinja expands the rest."""


class PageError(ValueError):
    """A block or a marker of a page breaks the rules."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    """Path of the page in the repository."""
    line: int
    """Line of the opening fence; the first is 1."""
    language: str
    text: str
    """The code as readers see it: macros are expanded, and the fence's indentation is removed."""
    marker: str = ""

    @property
    def place(self) -> str:
        """Return ``page:line``."""
        return f"{self.page}:{self.line}"

    @property
    def starts_server(self) -> bool:
        """Return True for a block that runs in the background until the end of its page."""
        return self.marker == SERVER

    @property
    def not_run(self) -> str:
        """Return the reason why the tests skip the block, or ''."""
        return self.marker.removeprefix(NOT_RUN) if self.marker.startswith(NOT_RUN) else ""

    @property
    def runs(self) -> bool:
        """Return True if the test of its page executes the block."""
        return self.language in RUN and not self.not_run

    @property
    def parses(self) -> bool:
        """Return True if a test parses the block as data."""
        return self.language in PARSED and not self.not_run

    @property
    def fate(self) -> str:
        """Return the test that runs or parses the block, or why none does."""
        if self.not_run.startswith(RUN_BY):
            return f"run by {self.not_run.removeprefix(RUN_BY)}"
        if self.not_run:
            return f"not run: {self.not_run}"
        if self.runs:
            return f"{'server, ' if self.starts_server else ''}run by {TESTS}"
        return f"parsed by {TESTS}" if self.parses else "shown only"


@dataclass(frozen=True)
class Page:
    """A document and its blocks."""

    path: str
    """Path in the repository."""
    blocks: tuple[Block, ...]
    needs_server: bool = False
    """The page sends requests to a demo server that another page starts."""


def page_paths(root: Path = ROOT) -> list[str]:
    """Return the documents of the repository, in the order of `PAGES`."""
    return [path.relative_to(root).as_posix() for glob in PAGES for path in sorted(root.glob(glob))]


def read_page(path: str, root: Path = ROOT) -> Page:
    """Find the blocks of a document.

    Raises:
        PageError: a marker or a reason is unknown or misplaced, or a block has no language.
    """
    text = (root / path).read_text(encoding="utf-8")
    expands = path.startswith("docs/")
    if expands:
        text = _RAW.sub(lambda found: _hide(found[1]), text)
    blocks, needs_server = [], False
    lines = text.splitlines()
    for item in _scan(path, lines):
        if isinstance(item, Block):
            shown = _expanded(item.text, lines[: item.line]) if expands else item.text
            block = Block(path, item.line, item.language, shown, item.marker)
            _check(block, root)
            blocks.append(block)
        elif blocks or needs_server:
            raise PageError(f"{path}: {NEEDS_SERVER!r} is allowed once, before the first block.")
        else:
            needs_server = True
    return Page(path, tuple(blocks), needs_server)


def _scan(path: str, lines: list[str]) -> Iterator[Block | None]:
    """Yield the blocks of a page as written, and None for the marker of the whole page."""
    at, marker = 0, ""
    while at < len(lines):
        line, number = lines[at], at + 1
        at += 1
        if opening := _OPENING.fullmatch(line):
            body, at = _body(path, lines, at, opening["fence"])
            indent = len(opening["indent"])
            text = "".join(f"{one[min(indent, _depth(one)) :]}\n" for one in body)
            language = _LANGUAGE.match(opening["info"].strip())
            if language is None:
                raise PageError(f"{path}:{number}: the block has no language.")
            yield Block(path, number, language[1], text, marker)
            marker = ""
            continue
        if marker:
            raise PageError(f"{path}:{number - 1}: {marker!r} is not directly before a block.")
        if comment := _COMMENT.fullmatch(line):
            content = comment[1].strip()
            if content == NEEDS_SERVER:
                yield None
            elif at < len(lines) and _OPENING.fullmatch(lines[at]):
                marker = content
            elif _is_marker(content):
                raise PageError(f"{path}:{number}: {content!r} is not directly before a block.")
        elif "<!--" in line and "-->" not in line.partition("<!--")[2]:
            while at < len(lines) and "-->" not in lines[at]:
                at += 1


def _body(path: str, lines: list[str], start: int, fence: str) -> tuple[list[str], int]:
    """Return the lines of a block and the index after its closing fence."""
    closing = re.compile(rf"\s*{re.escape(fence)}{fence[0]}*\s*")
    for at in range(start, len(lines)):
        if closing.fullmatch(lines[at]):
            return lines[start:at], at + 1
    raise PageError(f"{path}:{start}: the block does not end.")


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _is_marker(content: str) -> bool:
    return content == SERVER or content.startswith(("not run", "needs:"))


def _check(block: Block, root: Path) -> None:
    """Raise `PageError` for a marker or a language that is not allowed."""
    if name := OTHER_NAMES.get(block.language):
        raise PageError(f"{block.place}: the language is {block.language!r}; write {name!r}.")
    if block.marker in ("", SERVER):
        if block.starts_server and block.language != "sh":
            raise PageError(f"{block.place}: only a block of sh starts a server.")
        return
    if not block.not_run:
        raise PageError(f"{block.place}: the marker {block.marker!r} is unknown.")
    if block.not_run.startswith(RUN_BY):
        path = block.not_run.removeprefix(RUN_BY)
        if not (path.startswith("tests/") and (root / path).is_file()):
            raise PageError(f"{block.place}: there is no test {path}.")
    elif block.not_run not in REASONS:
        raise PageError(
            f"{block.place}: the reason {block.not_run!r} is unknown; allowed are "
            f"{', '.join(map(repr, REASONS))} and '{RUN_BY}TESTFILE'."
        )


def _hide(text: str) -> str:
    return text.translate(str.maketrans(_SIGNS, _HIDDEN))


def _expanded(text: str, before: list[str]) -> str:
    """Expand the macros of a block, and show the braces of its raw regions.

    Args:
        text: The block as written.
        before: The lines of the page before it; they can set variables.
    """
    if "{{" in text or "{%" in text:
        variables = "".join(_SET.findall("\n".join(before)))
        text = _jinja().from_string(variables + text).render()
    return text.translate(str.maketrans(_HIDDEN, _SIGNS))


@cache
def _jinja() -> Environment:
    """Return an environment with the macros that the pages of the site have."""
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)

    class Registry:
        variables = environment.globals
        filters = environment.filters

        def macro(self, function: object, name: str = "") -> object:
            environment.globals[name or str(getattr(function, "__name__", ""))] = function
            return function

    define_env(Registry())
    return environment


def _first_line(text: str) -> str:
    lines = [line for line in dedent(text).splitlines() if line.strip()]
    return lines[0] if lines else ""


def main() -> int:
    """Print each block with its fate, and their numbers. Return 1 if a page breaks the rules."""
    counts: Counter[str] = Counter()
    errors = []
    for path in page_paths():
        try:
            page = read_page(path)
        except PageError as problem:
            errors.append(str(problem))
            continue
        for block in page.blocks:
            counts[block.fate] += 1
            cells = f"{block.place:<40}  {block.language:<10}  {_first_line(block.text)[:60]:<60}"
            sys.stdout.write(f"{cells}  {block.fate}\n")
    sys.stdout.write(f"\n{counts.total()} blocks\n")
    for fate, number in counts.most_common():
        sys.stdout.write(f"{number:6}  {fate}\n")
    for error in errors:
        sys.stderr.write(f"error: {error}\n")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
