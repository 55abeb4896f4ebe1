"""The Dockerfile's own steps, in a clean virtual environment, with nothing of this one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import pytest
import yaml
from PIL import Image

from tests.images.dockerfile import Build, Dockerfile, Ignored, StepFailed

ROOT = Path(__file__).parents[2]

IMPORT_ALL = """
import importlib, pkgutil, serve_app
names = [one.name for one in pkgutil.walk_packages(serve_app.__path__, "serve_app.")]
names.remove("serve_app.autoscaling.chart")  # the extra 'plan'
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


@pytest.mark.timeout(900)
def test_the_steps_of_the_image_make_an_installation_that_paints(
    tmp_path: Path, dockerfile: Dockerfile, ignored: Ignored, report: Callable[[str], None]
) -> None:
    """Target cpu, with torch from wherever pip finds it: an empty TORCH_INDEX, as gpu has it."""
    _needs_packages(tmp_path / "reached")
    started_at = monotonic()
    build = Build(dockerfile, ROOT, ignored, tmp_path, {"TORCH_INDEX": ""})
    build.perform("cpu")
    installed_at = monotonic()

    assert not [name for name in build.environment if name in ("PYTHONPATH", "VIRTUAL_ENV")]
    assert build.environment["HOME"] == f"{build.root}/home/serve"
    assert "seed" in build.run('diffusion-serve infer --prompt "A cat wearing a hat"')
    with Image.open(build.workdir / "image.png") as picture:
        assert picture.format == "PNG"
        assert len(set(picture.convert("RGB").getdata())) > 100
    assert build.run("diffusion-serve check configs/demo.yaml").endswith("ok\n")

    # Each module finds what it imports; those of the gateway, too, which infer is without.
    script = build.root / "import_all.py"
    script.write_text(IMPORT_ALL)
    imported = build.run(f"python {script}").split()
    assert int(imported[-2]) > 50
    assert Path(imported[-1]).is_relative_to(build.root / "opt" / "venv")

    for config in (build.workdir / "configs").glob("*.yaml"):
        assert yaml.safe_load(config.read_text())["http_options"]["host"] == "0.0.0.0"
    done_at = monotonic()
    report(
        f"the image's steps: {installed_at - started_at:.0f} s, "
        f"what is installed: {done_at - installed_at:.0f} s"
    )


def test_a_step_that_fails_ends_the_build_with_what_it_printed(
    tmp_path: Path, dockerfile: Dockerfile, ignored: Ignored
) -> None:
    build = Build(dockerfile, tmp_path, ignored, tmp_path / "build", {})
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    (tmp_path / "constraints.txt").write_text("")
    with pytest.raises(StepFailed, match="KeyError: 'dependencies'"):
        build.perform("build")
