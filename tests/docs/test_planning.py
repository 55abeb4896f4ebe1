"""The output that the planning page shows is that of its first command."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve_app.cli import cli

ROOT = Path(__file__).parents[2]


def test_the_first_plan_prints_what_the_page_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = Path("docs/operate/planning.md").read_text(encoding="utf-8")
    blocks: list[tuple[str, str]] = re.findall(r"```(sh|text)\n(.*?)```", text, re.DOTALL)
    (kind, command), (shown, output) = blocks[:2]
    assert (kind, shown) == ("sh", "text")
    result = CliRunner().invoke(cli, shlex.split(command.replace("\\\n", " "))[1:])
    assert result.exit_code == 0
    assert result.output == output
