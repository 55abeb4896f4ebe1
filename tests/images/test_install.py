"""An installation as the image has it: the wheel and its pinned dependencies, and nothing else."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import numpy as np
import pytest
from PIL import Image

from tests.wheel import ROOT, build_wheel, needs_packages, run

IMPORT_ALL = """
import importlib, pkgutil, serve_app
names = [one.name for one in pkgutil.walk_packages(serve_app.__path__, "serve_app.")]
names.remove("serve_app.planner.chart")  # the extra 'plan'
for name in names:
    importlib.import_module(name)
print(len(names), serve_app.__file__)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that is removed afterwards: an installation is gigabytes."""
    with TemporaryDirectory(prefix="image-") as name:
        yield Path(name)


@pytest.mark.slow
@pytest.mark.nightly  # README's installation runs for each change
def test_the_pinned_dependencies_are_all_that_the_package_imports(
    folder: Path, report: Callable[[str], None]
) -> None:
    needs_packages(folder / "reached")
    started_at = monotonic()
    wheel = build_wheel(folder)
    run([sys.executable, "-m", "venv", folder / "venv"], folder)
    python = folder / "venv" / "bin" / "python"
    run(
        [python, "-m", "pip", "install", "--no-cache-dir", "--no-compile", "--only-binary", ":all:",
         "--constraint", ROOT / "constraints.txt", f"{wheel}[quantize,storage,tracing]"],
        folder, timeout_s=800,
    )  # fmt: skip
    report(f"a clean installation: {monotonic() - started_at:.0f} s")
    run([python, "-m", "pip", "check"], folder)

    count, path = run([python, "-c", IMPORT_ALL], folder).split()[-2:]
    assert int(count) > 50
    assert Path(path).is_relative_to(folder / "venv")
    run(
        [python.with_name("diffusion-serve"), "infer", "--prompt", "a red circle on a blue "
         "background", "--output", "image.png"],
        folder,
    )  # fmt: skip
    with Image.open(folder / "image.png") as image:
        assert np.unique(np.asarray(image)).size > 50  # not one colour
