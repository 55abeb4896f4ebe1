"""README.md from its first line to its last, with its installation, in an empty home."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import pytest

from tests.docs.page_runner import PageRunner, Workspace
from tests.wheel import needs_packages
from tools.docs.blocks import RUN_BY, page_paths, read_page

HERE = f"{RUN_BY}tests/docs/test_install.py"


def _installs(path: str) -> list[str]:
    return [block.text for block in read_page(path).blocks if block.not_run == HERE]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that is removed afterwards: an installation is gigabytes."""
    with TemporaryDirectory(prefix="readme-") as name:
        yield Path(name)


@pytest.mark.serve
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_reader_can_follow_the_readme(folder: Path, report: Callable[[str], None]) -> None:
    needs_packages(folder / "tmp" / "reached")
    started_at = monotonic()
    workspace = Workspace(folder)
    # Python itself, without the environment that runs this test.
    environment = workspace.environment(str(Path(sys.base_prefix) / "bin"))
    # Python compiles what it imports. pip would compile all 23,000 files, and keep every download.
    environment |= {"PIP_COMPILE": "0", "PIP_NO_CACHE_DIR": "1"}
    runner = PageRunner(workspace, environment)
    runner.run(read_page("README.md"), also=HERE)
    report(f"README.md with its installation: {monotonic() - started_at:.0f} s")
    for block, seconds in runner.took_s:
        report(f"  {block.place}: {seconds:.0f} s")


def test_other_pages_install_as_the_readme_does() -> None:
    shown = _installs("README.md")
    assert shown, "README.md has no block that this test runs"
    for path in page_paths():
        assert set(_installs(path)) <= set(shown), path
