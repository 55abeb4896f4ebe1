"""Every block of the documents works as it is shown: commands run, data parses, configs check."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.cli.check import check_serve_file
from serve_app.config.models import parse_app_config
from tests.docs.page_runner import PageRunner, Workspace
from tests.serve_process import demo_config, free_port, serving_config
from tools.docs.blocks import ROOT, Block, Page, PageError, page_paths, read_page

APP_KEYS = {"model", "engine", "gateway"}
"""Top-level keys of an application's ``args``; documents show such parts alone, too."""


def _pages() -> Iterator[Page]:
    """Yield the pages that keep the rules; tests/docs/test_markers.py fails for the others."""
    for path in page_paths():
        try:
            yield read_page(path)
        except PageError:
            continue


IN_CI = pytest.mark.skipif(
    "CI" in os.environ, reason="tests/docs/test_install.py runs it, with its installation"
)
"""Mark of README.md. Elsewhere that test is skipped if pip reaches no packages."""


def _marks(page: Page) -> list[pytest.MarkDecorator]:
    starts = page.needs_server or any(block.starts_server for block in page.blocks)
    kind = pytest.mark.serve if starts else pytest.mark.slow
    # A server for one page takes as long as many tests. README's starts, and runs for each change.
    own = any(block.starts_server for block in page.blocks) and page.path != "README.md"
    nightly = [pytest.mark.nightly] if own else []
    return [kind, *nightly, *([IN_CI] if page.path == "README.md" else [])]


RUN = [
    pytest.param(page, marks=_marks(page), id=page.path)
    for page in _pages()
    if any(block.runs for block in page.blocks)
]
DATA = [
    pytest.param(block, id=block.place)
    for page in _pages()
    for block in page.blocks
    if block.parses
]


@pytest.fixture(scope="module")
def demo_url() -> Iterator[str]:
    """A demo server for the pages that need one."""
    with serving_config(demo_config(free_port())) as url:
        yield url


@pytest.mark.parametrize("page", RUN)
def test_the_blocks_of_a_page_run(
    page: Page, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url: str | None = request.getfixturevalue("demo_url") if page.needs_server else None
    workspace = Workspace(tmp_path)
    PageRunner(workspace, workspace.use_packages()).run(page, url)


@pytest.mark.parametrize("block", DATA)
def test_shown_data_is_valid(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.language == "json":
        json.loads(block.text)
        return
    monkeypatch.chdir(ROOT)
    for document in yaml.safe_load_all(block.text):
        if not isinstance(document, dict):
            continue
        if "applications" in document:
            path = tmp_path / "serve.yaml"
            path.write_text(yaml.safe_dump(document))
            check_serve_file(path)
        for part in _application_parts(document):
            parse_app_config(part)


def _application_parts(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the arguments of an application that a snippet shows without the whole file."""
    if document.keys() <= APP_KEYS:
        yield document
    args = document.get("args")
    if isinstance(args, dict) and args.keys() <= APP_KEYS:
        yield args
