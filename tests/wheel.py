"""The wheel of this project, built from a copy of the clone's files."""

import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def clean_environment() -> dict[str, str]:
    """Return this process's environment without the variables that lead to the clone."""
    names = ("PYTHONPATH", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in names}


def run(command: list[str | Path], cwd: Path, timeout_s: float = 300) -> str:
    """Run a command away from the clone and return its output; fail the test if it fails."""
    done = subprocess.run(
        command, cwd=cwd, env=clean_environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def needs_packages(folder: Path) -> None:
    """Skip where pip reaches no packages; fail where continuous integration must reach them."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, "greenlet"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        reason = f"pip cannot fetch packages: {done.stderr.strip().splitlines()[-1]}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


def build_wheel(folder: Path) -> Path:
    """Build the wheel in ``folder``; needs the package index only if setuptools is not here."""
    source = folder / "source"
    # A copy: setuptools leaves a build folder behind, whose old files get into the next wheel.
    source.mkdir()
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(
        ROOT / "serve_app", source / "serve_app", ignore=shutil.ignore_patterns("__pycache__")
    )
    command: list[str | Path] = [sys.executable, "-m", "pip", "wheel", "--no-deps"]
    if _backend_is_installed():
        command += ["--no-build-isolation", "--no-index"]
    run([*command, "--wheel-dir", folder, source], folder)
    [path] = folder.glob("*.whl")
    return path


def _backend_is_installed() -> bool:
    [requirement] = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    name, _, pin = requirement.partition("==")
    try:
        return version(name) == pin
    except PackageNotFoundError:
        return False
