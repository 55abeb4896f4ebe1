"""The Dockerfile's own steps, in a clean virtual environment, with nothing of this one."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.images.dockerfile import Build, Dockerfile, Ignored, StepFailed
from tests.serve_configs import SERVE_CONFIGS

ROOT = Path(__file__).parents[2]

IMPORT_ALL = """
import importlib, pkgutil, serve_app
names = [one.name for one in pkgutil.walk_packages(serve_app.__path__, "serve_app.")]
names.remove("serve_app.planner.chart")  # the extra 'plan'
for name in names:
    importlib.import_module(name)
print(len(names), serve_app.__file__)
"""


def _needs_packages(folder: Path) -> None:
    """Skips where pip reaches no packages; fails where continuous integration must."""
    requires = f"setuptools=={_pin('setuptools')}"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, requires],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        reason = f"pip cannot fetch {requires}: {done.stderr.strip().splitlines()[-1]}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


def _pin(name: str) -> str:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    (version,) = [pin.partition("==")[2] for pin in pins if pin.startswith(f"{name}==")]
    return version


@pytest.fixture
def folder() -> Iterator[Path]:
    """Gone afterwards: an installation is gigabytes."""
    with TemporaryDirectory(prefix="image-") as name:
        yield Path(name)


@pytest.mark.timeout(900)
def test_the_steps_of_the_image_make_an_installation_that_paints(
    folder: Path, dockerfile: Dockerfile, ignored: Ignored, report: Callable[[str], None]
) -> None:
    """Target gpu, whose steps are those of cpu and more, with torch from wherever pip finds it."""
    _needs_packages(folder / "reached")
    started_at = monotonic()
    build = Build(dockerfile, ROOT, ignored, folder, {})
    build.perform("gpu")
    installed_at = monotonic()

    assert not [name for name in build.environment if name in ("PYTHONPATH", "VIRTUAL_ENV")]
    assert build.environment["HOME"] == f"{build.root}/home/serve"
    # Each module finds what it imports; those of the gateway, too, which infer is without.
    script = build.root / "import_all.py"
    script.write_text(IMPORT_ALL)
    with ThreadPoolExecutor() as both:
        imported = both.submit(build.run, f"python {script}")
        assert "seed" in build.run('diffusion-serve infer --prompt "A cat wearing a hat"')
    count, path = imported.result().split()[-2:]
    assert int(count) > 50
    assert Path(path).is_relative_to(build.root / "opt" / "venv")

    with Image.open(build.workdir / "image.png") as picture:
        assert picture.format == "PNG"
        assert np.unique(np.asarray(picture)).size > 50  # not one colour
    assert build.run("diffusion-serve check configs/demo.yaml").endswith("ok\n")  # cpu's step
    build.run("python -c 'from torchao import quantization'")
    for config in (build.workdir / "configs" / path.name for path in SERVE_CONFIGS):
        assert yaml.safe_load(config.read_text())["http_options"]["host"] == "0.0.0.0"
    done_at = monotonic()
    report(
        f"the image's steps: {installed_at - started_at:.0f} s, "
        f"what is installed: {done_at - installed_at:.0f} s"
    )


SMALL = """
ARG BASE_IMAGE=scratch
FROM ${BASE_IMAGE} AS base
RUN no-such-program
ENV HOME=/home/serve
FROM ${BASE_IMAGE} AS build
WORKDIR /opt/build
COPY said.txt folder ./
ARG WORD=default
RUN echo "$WORD" > word.txt && \\
    pwd
FROM base AS target
WORKDIR /app
COPY --from=build /opt/build/word.txt /opt/build/said.txt ./
RUN test ! -e /opt/build && FAIL
"""


@pytest.mark.parametrize(("arguments", "word"), [({}, "default"), ({"WORD": ""}, "")])
def test_stages_are_performed_as_docker_performs_them(
    tmp_path: Path, arguments: dict[str, str], word: str
) -> None:
    context = tmp_path / "context"
    (context / "folder").mkdir(parents=True)
    for name in ("said.txt", "folder/inside.txt", "folder/ignored.txt"):
        (context / name).write_text(name)
    file = Dockerfile(SMALL.replace("FAIL", "cat word.txt"))
    build = Build(file, context, Ignored("folder/ig*"), tmp_path / "build", arguments)
    build.perform("target")
    assert sorted(path.name for path in build.workdir.iterdir()) == ["said.txt", "word.txt"]
    assert build.run("cat word.txt").strip() == word
    assert build.environment["HOME"] == f"{build.root}/home/serve"
    earlier = tmp_path / "build" / "stages" / "build" / "opt" / "build"
    assert sorted(path.name for path in earlier.iterdir()) == ["inside.txt", "said.txt", "word.txt"]

    failing = Dockerfile(SMALL.replace("FAIL", "echo told && false"))
    with pytest.raises(StepFailed, match="told"):
        Build(failing, context, Ignored(""), tmp_path / "failing", {}).perform("target")
