"""Links, images and paths in documents have targets; `make docs` checks the links inside docs/."""

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.docs.page_runner import tracked_files
from tools.docs.blocks import ROOT

DOCUMENTS = [name for name in tracked_files() if name.endswith(".md")]
OUTSIDE = [name for name in DOCUMENTS if not name.startswith("docs/")]
WITH_PATHS = [name for name in DOCUMENTS if name != "CHANGELOG.md"]  # it names what is gone

_TARGET = re.compile(r"""<(?:a|img|source)\s[^>]*?(?:href|src|srcset)=["']([^"'\s]+)""")
_ANCHOR = re.compile(r"""<a\s+(?:id|name)=["']([^"']+)""")
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_PATH = re.compile(
    r"(?:serve_app|tests|configs|cluster|docs|tools|monitoring|images)/[\w./*<>{}-]*"
)
_STANDS_FOR = re.compile(r"<[^>]*>|\{[^}]*\}|(?<![A-Z])(?!README)[A-Z][A-Z_]+(?![a-z])")
"""A part of a path that stands for any name, such as OVERLAY."""


@cache
def _tokens(path: str) -> list[Token]:
    tokens = MarkdownIt().enable("table").parse((ROOT / path).read_text(encoding="utf-8"))
    return [*tokens, *(child for token in tokens for child in token.children or ())]


def _links(path: str) -> Iterator[str]:
    """Yield the targets of the links and images of a document."""
    for token in _tokens(path):
        if token.type in ("link_open", "image"):
            yield str(token.attrs.get("href") or token.attrs.get("src"))
        elif token.type in ("html_block", "html_inline"):
            yield from _TARGET.findall(token.content)


@cache
def _anchors(path: str) -> set[str]:
    """Return the anchors that a Markdown file has on GitHub."""
    tokens = MarkdownIt().parse((ROOT / path).read_text(encoding="utf-8"))
    seen: Counter[str] = Counter()
    found = set()
    for heading, inline in pairwise(tokens):
        if heading.type == "heading_open":
            parts = inline.children or ()
            text = "".join(part.content for part in parts if part.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    html = "".join(token.content for token in _tokens(path) if token.type.startswith("html"))
    return found | set(_ANCHOR.findall(html))


def _problem(path: str, link: str) -> str | None:
    """Say what is wrong with a link to a file of the repository, or to a heading of one."""
    name, _, anchor = unquote(link).partition("#")
    target = (ROOT / path).parent / name if name else ROOT / path
    if not target.resolve().is_relative_to(ROOT):
        return f"{link} leaves the repository"
    if not target.exists():
        return f"{link} does not exist"
    relative = target.resolve().relative_to(ROOT).as_posix()
    if anchor and relative.endswith(".md") and anchor not in _anchors(relative):
        return f"{link}: {relative} has no such heading"
    return None


@pytest.mark.parametrize("path", OUTSIDE)
def test_links_and_images_have_targets(path: str) -> None:
    local = (link for link in _links(path) if not re.match(r"[a-z]+:", link))
    assert [problem for link in local if (problem := _problem(path, link))] == []


def _lines_without_blocks(path: str) -> Iterator[str]:
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    for token in _tokens(path):
        if token.type == "fence" and token.map:
            lines[slice(*token.map)] = [""] * (token.map[1] - token.map[0])
    yield from lines


def _exists(path: str, name: str) -> bool:
    pattern = _STANDS_FOR.sub("*", name).rstrip("/")
    return any(
        any(folder.glob(pattern)) if "*" in pattern else (folder / pattern).exists()
        for folder in (ROOT, (ROOT / path).parent)
    )


@pytest.mark.parametrize("path", WITH_PATHS)
def test_named_files_and_folders_exist(path: str) -> None:
    missing = []
    for line in _lines_without_blocks(path):
        for code in _CODE.findall(line):
            name = code.partition("::")[0]
            if _PATH.fullmatch(name) and not _exists(path, name):
                missing.append(name)
    assert missing == []


@pytest.mark.parametrize("path", DOCUMENTS)
def test_no_image_is_left_to_be_added(path: str) -> None:
    assert "<!-- image:" not in (ROOT / path).read_text(encoding="utf-8")


def test_documents_are_found() -> None:
    assert {"README.md", "docs/index.md", "cluster/README.md"} <= set(DOCUMENTS)
    assert len(OUTSIDE) > 10


@pytest.mark.parametrize(
    ("name", "exists"),
    [
        ("serve_app/errors.py", True),
        ("serve_app/mistakes.py", False),
        ("configs/", True),
        ("configs/*.yaml", True),
        ("cluster/overlays/OVERLAY/kustomization.yaml", True),
        ("cluster/overlays/<name>/nothing.yaml", False),
        ("cluster/README.md", True),
        ("cluster/readyou.md", False),
    ],
)
def test_a_path_with_placeholders_is_compared_as_a_pattern(name: str, exists: bool) -> None:
    assert _exists("README.md", name) == exists


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ("cluster/README.md#", None),
        ("#diffusion-serve", None),
        ("#nowhere", "README.md has no such heading"),
        ("nowhere.md", "does not exist"),
        ("../outside.md", "leaves the repository"),
        ("SECURITY.md#nowhere", "SECURITY.md has no such heading"),
    ],
)
def test_a_link_without_a_target_is_found(link: str, problem: str | None) -> None:
    found = _problem("README.md", link)
    assert found is None if problem is None else problem in (found or "")
