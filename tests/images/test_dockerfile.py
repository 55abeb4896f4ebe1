"""The rules of the Dockerfile that protect a user of the images."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from serve_app import __version__
from serve_app.config.environment import (
    ALLOCATOR_SETTINGS,
    ALLOCATOR_VARIABLE,
    PROXY_CALLBACK,
    PROXY_CALLBACK_VARIABLE,
)
from tests.serve_configs import SERVE_CONFIGS

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "images" / "Dockerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")

_LINES = (line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#"))
INSTRUCTIONS: list[tuple[str, str]] = [
    (keyword, value)
    for keyword, _, value in (
        line.partition(" ") for line in "\n".join(_LINES).replace("\\\n", " ").splitlines() if line
    )
]
"""(keyword, value) of each instruction, in the order of the file."""


def _values(keyword: str) -> list[str]:
    return [value for name, value in INSTRUCTIONS if name == keyword]


def _environment() -> dict[str, str]:
    words = (word for value in _values("ENV") for word in shlex.split(value))
    return dict(word.split("=", 1) for word in words)


def _lint(path: Path) -> subprocess.CompletedProcess[str]:
    command = [HADOLINT, "--no-color", path]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize("name", ["Dockerfile", "model.Dockerfile"])
def test_hadolint_reports_nothing(name: str) -> None:
    done = _lint(DOCKERFILE.with_name(name))
    assert done.returncode == 0, done.stdout
    assert not done.stdout


@pytest.mark.parametrize(
    ("good", "broken", "rule"),
    [
        ("FROM ${BASE_IMAGE} AS base", "FROM python:latest AS base", "DL3007"),
        ("pip install --no-cache-dir", "pip install", "DL3042"),
        ("USER 1000:0", "USER root", "DL3002"),
    ],
)
def test_hadolint_sees_a_mistake(tmp_path: Path, good: str, broken: str, rule: str) -> None:
    text = DOCKERFILE.read_text()
    assert good in text
    copy = tmp_path / "Dockerfile"
    copy.write_text(text.replace(good, broken))
    assert rule in _lint(copy).stdout


def test_stages_use_one_pinned_base_image_with_a_python_that_the_project_supports() -> None:
    stages = {value.split()[2] for value in _values("FROM")}
    bases = {value.split()[0] for value in _values("FROM")}
    assert bases - stages == {"${BASE_IMAGE}"}
    [image] = [value for value in _values("ARG") if value.startswith("BASE_IMAGE=")]
    tag = re.fullmatch(r"BASE_IMAGE=python:3\.(\d+)\.\d+-slim-[a-z]+", image)
    assert tag
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert int(tag[1]) >= int(project["requires-python"].removeprefix(">=3."))


def test_copied_files_exist_and_reach_the_builder() -> None:
    ignore = (ROOT / "images" / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignore
    assert "**/__pycache__" in ignore
    copied = [value.split()[:-1] for value in _values("COPY") if not value.startswith("--from")]
    sources = {source for words in copied for source in words}
    assert sources == {line.removeprefix("!") for line in ignore if line.startswith("!")}
    for source in sources:
        assert (ROOT / source).exists()


def test_every_package_is_pinned_and_comes_as_a_wheel() -> None:
    runs = [command.split() for value in _values("RUN") for command in value.split("&&")]
    installs = [words for words in runs if words[:2] == ["pip", "install"]]
    assert installs
    for words in installs:
        if words[-1] == ".":  # the project itself, whose dependencies are installed before
            assert "--no-deps" in words
        else:
            assert words[words.index("--constraint") + 1] == "constraints.txt"
            assert words[words.index("--only-binary") + 1] == ":all:"


def test_the_version_is_that_of_the_package() -> None:
    versions = {value for value in _values("ARG") if value.startswith("VERSION=")}
    assert versions == {f"VERSION={__version__}"}
    for value in _values("LABEL"):
        assert "org.opencontainers.image.version=$VERSION" in shlex.split(value)


def test_containers_do_not_run_as_root() -> None:
    assert _values("USER") == ["1000:0", "0", "1000:0"]  # as root, gpu installs compilers
    environment = _environment()
    [setup] = [value for value in _values("RUN") if "useradd" in value]
    assert "useradd --uid 1000 --gid 0" in setup
    for folder in (*_values("VOLUME"), "/app", environment["HOME"]):
        assert folder in setup  # which makes it, for this user
    assert environment["HF_HOME"] in _values("VOLUME")


@pytest.mark.skipif(
    shutil.which("gcc") is None and "CI" not in os.environ, reason="runs a check with gcc"
)
def test_the_gpu_image_has_what_torch_compiles_with() -> None:
    gpu = INSTRUCTIONS[INSTRUCTIONS.index(("FROM", "base AS gpu")) :]
    [install] = [value for keyword, value in gpu if keyword == "RUN" and "apt-get" in value]
    packages = re.findall(r"apt-get install (.*?) &&", install)[0].split()
    assert {"g++", "libc6-dev"} < set(packages)  # g++ needs gcc, which triton calls
    *_, check = install.split("&&")
    done = subprocess.run(check, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_probes_of_kuberay_find_bash_and_wget() -> None:
    installed = re.findall(r"apt-get install (.*?) &&", " ".join(_values("RUN")))
    assert "wget" in " ".join(installed).split()
    # Debian's slim images have bash as an essential package.
    assert "slim" in next(value for value in _values("ARG") if value.startswith("BASE_IMAGE="))


def test_the_proxies_have_the_middlewares_of_diffusion_serve() -> None:
    assert _environment()[PROXY_CALLBACK_VARIABLE] == PROXY_CALLBACK


def test_the_allocator_of_a_gpu_expands_its_segments() -> None:
    """The name is the newer one: a user's PYTORCH_CUDA_ALLOC_CONF takes precedence over it."""
    assert _environment()[ALLOCATOR_VARIABLE] == ALLOCATOR_SETTINGS


def test_a_container_without_a_command_serves_a_config_on_its_port() -> None:
    assert not _values("ENTRYPOINT")  # KubeRay sets commands of its own
    [command] = _values("CMD")
    assert (ROOT / json.loads(command)[-1]).is_file()
    [port] = _values("EXPOSE")
    [health] = _values("HEALTHCHECK")
    assert f"http://127.0.0.1:{port}/-/healthz" in health
    for config in SERVE_CONFIGS:
        options = yaml.safe_load(config.read_text())["http_options"]
        assert options == {"host": "0.0.0.0", "port": int(port)}
