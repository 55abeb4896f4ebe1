"""The messages that the pages for operators quote are those of the code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "operate"


def _text(node: ast.AST) -> str:
    """Return a string's text, with ``…`` for each value that is filled in; empty if it is none."""
    match node:
        case ast.Constant(value=str(text)):
            return re.sub(r"%\.?\d*[dfgrs]", "…", text)
        case ast.JoinedStr(values=parts):
            return "".join(_text(part) for part in parts)
        case ast.FormattedValue():
            return "…"
    return ""


@pytest.fixture(scope="module")
def texts() -> str:
    """All texts of the code, one a line."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "serve_app").rglob("*.py")]
    return "\n".join(_text(node) for tree in trees for node in ast.walk(tree))


def _messages(page: str) -> list[str]:
    """Return the messages in a page: of tables with a column ``message``, and after ``log has``."""
    quoted = re.findall(r"(?:log has|message is)\s`([^`]+)`", page)
    for table in re.findall(r"^\| message \|.*\n\|.*\n((?:\|.*\n)+)", page, re.M):
        for row in table.splitlines():
            quoted += re.findall(r"`([^`]+)`", row.split("|")[1])
    return quoted


@pytest.mark.parametrize(
    ("page", "least"), [("troubleshooting", 40), ("top", 8), ("metrics", 1), ("traces", 1)]
)
def test_quoted_messages_exist(page: str, least: int, texts: str) -> None:
    messages = _messages((PAGES / f"{page}.md").read_text())
    assert len(messages) >= least
    assert [one for one in messages if one not in texts] == []
