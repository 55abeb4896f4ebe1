"""What must be true of the Dockerfile itself, and of what it is built from."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from serve_app import __version__
from serve_app.config.environment import PROXY_CALLBACK_VARIABLE
from serve_app.serving import PROXY_CALLBACK
from tests.images.dockerfile import Dockerfile, Ignored, pairs
from tests.serve_configs import SERVE_CONFIGS

ROOT = Path(__file__).parents[2]
HADOLINT = Path(sys.executable).with_name("hadolint")
TARGETS = ("cpu", "gpu")


def _lint(path: Path) -> subprocess.CompletedProcess[str]:
    command = [HADOLINT, "--no-color", path]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_hadolint_has_nothing_to_say() -> None:
    done = _lint(ROOT / "images" / "Dockerfile")
    assert done.returncode == 0, done.stdout
    assert not done.stdout


@pytest.mark.parametrize(
    ("good", "broken", "rule"),
    [
        ("FROM ${BASE_IMAGE} AS base", "FROM python:latest AS base", "DL3007"),
        ("pip install --no-cache-dir", "pip install", "DL3042"),
        ("USER 1000:0", "USER root", "DL3002"),
        ("--no-install-recommends ", "", "DL3015"),
    ],
)
def test_hadolint_sees_a_mistake(tmp_path: Path, good: str, broken: str, rule: str) -> None:
    text = (ROOT / "images" / "Dockerfile").read_text()
    assert good in text
    copy = tmp_path / "Dockerfile"
    copy.write_text(text.replace(good, broken))
    done = _lint(copy)
    assert done.returncode == 1
    assert rule in done.stdout


def test_every_stage_stands_on_one_pinned_base_image(dockerfile: Dockerfile) -> None:
    outside = {one.base for one in dockerfile.stages.values()} - dockerfile.stages.keys()
    assert outside == {"${BASE_IMAGE}"}
    tag = re.fullmatch(
        r"python:3\.(\d+)\.\d+-slim-[a-z]+", dockerfile.arguments["BASE_IMAGE"]
    )  # slim has no compiler
    assert tag
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert int(tag[1]) >= int(project["requires-python"].removeprefix(">=3."))


@pytest.mark.parametrize("target", TARGETS)
def test_it_runs_as_a_user_who_may_write_where_it_must(dockerfile: Dockerfile, target: str) -> None:
    assert dockerfile.of(target, "USER")[-1] == "1000:0"
    environment = dockerfile.environment(target)
    assert environment["HF_HOME"] in dockerfile.of(target, "VOLUME")
    setup = shlex.split(dockerfile.of(target, "RUN")[0])
    made = setup[setup.index("install", setup.index("useradd")) :]
    assert made == [
        "install", "--directory", "--owner", "1000", "--group", "0", "--mode", "0775",
        dockerfile.of(target, "WORKDIR")[-1], environment["HF_HOME"],
    ]  # fmt: skip
    user = setup[setup.index("useradd") : setup.index("chmod") - 1]
    assert user[1:5] == ["--uid", "1000", "--gid", "0"]
    assert user[user.index("--home-dir") + 1] == environment["HOME"]
    assert setup[setup.index("chmod") :][1:4] == ["--recursive", "g=u", environment["HOME"]]


def test_only_what_probes_need_comes_from_debian(dockerfile: Dockerfile) -> None:
    """Neither a compiler nor a driver."""
    installed = []
    for stage in dockerfile.stages:
        for value in dockerfile.of(stage, "RUN"):
            for command in re.findall(r"apt-get install ([^&]*)", value):
                installed += [word for word in command.split() if not word.startswith("-")]
    assert set(installed) == {"wget"}


def test_the_targets_differ_in_nothing_but_cuda(dockerfile: Dockerfile) -> None:
    cpu, gpu = (dockerfile.environment(target) for target in TARGETS)
    assert dict(gpu.items() - cpu.items()) == {
        "NVIDIA_VISIBLE_DEVICES": "all",
        "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
    }
    assert cpu.items() < gpu.items()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = " ".join(project["optional-dependencies"]["quantize"])
    steps = [
        [value.replace(f" {extra} ", " ") for value in dockerfile.of(f"packages-{target}", "RUN")]
        for target in TARGETS
    ]
    assert [value.split() for value in steps[0]] == [value.split() for value in steps[1]]
    assert extra in dockerfile.of("packages-gpu", "RUN")[-1].split()
    last = [dockerfile.stages[target].instructions for target in TARGETS]
    cpu_steps, gpu_steps = (
        [one.value for one in steps if one.keyword in ("COPY", "RUN")] for steps in last
    )
    assert [
        value.replace("packages-gpu", "packages-cpu").replace("sdxl.yaml", "demo.yaml")
        for value in gpu_steps
    ] == cpu_steps
    indexes = [dockerfile.defaults(f"packages-{target}")["TORCH_INDEX"] for target in TARGETS]
    assert indexes[0].endswith("/cpu")
    assert indexes[1] == ""


def test_every_package_is_pinned_and_comes_as_a_wheel(dockerfile: Dockerfile) -> None:
    installs = [
        command.split()
        for stage in dockerfile.stages.values()
        for one in stage.instructions
        if one.keyword == "RUN"
        for command in one.value.split("&&")
        if "pip install" in command
    ]
    assert len(installs) == 5
    for words in installs:
        assert "--no-cache-dir" in words
        if "." in words:  # the project itself; its packages are there
            assert "--no-deps" in words
        else:
            assert words[words.index("--constraint") + 1] == "constraints.txt"
            assert words[words.index("--only-binary") + 1] == ":all:"


@pytest.mark.parametrize("target", TARGETS)
def test_the_labels_are_those_of_the_open_container_initiative(
    dockerfile: Dockerfile, target: str
) -> None:
    labels = dict(pair for value in dockerfile.of(target, "LABEL") for pair in pairs(value))
    prefix = "org.opencontainers.image."
    assert all(name.startswith(prefix) for name in labels)
    assert labels[f"{prefix}version"] == "$VERSION"
    assert labels[f"{prefix}revision"] == "$REVISION"
    assert target in labels[f"{prefix}title"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert labels[f"{prefix}licenses"] == project["license"]
    assert dockerfile.defaults(target)["VERSION"] == __version__


@pytest.mark.parametrize("target", TARGETS)
def test_it_is_asked_for_its_health_where_it_listens(dockerfile: Dockerfile, target: str) -> None:
    (port,) = dockerfile.of(target, "EXPOSE")
    command = json.loads(dockerfile.of(target, "HEALTHCHECK")[-1].partition("CMD ")[2])
    assert command[0] == "wget"
    assert command[-1] == f"http://127.0.0.1:{port}/-/healthz"
    for config in SERVE_CONFIGS:
        assert yaml.safe_load(config.read_text())["http_options"]["port"] == int(port), config


@pytest.mark.parametrize("target", TARGETS)
def test_the_proxies_have_the_middlewares_of_diffusion_serve(
    dockerfile: Dockerfile, target: str
) -> None:
    assert dockerfile.environment(target)[PROXY_CALLBACK_VARIABLE] == PROXY_CALLBACK


@pytest.mark.parametrize("target", TARGETS)
def test_without_a_command_it_serves_the_demo(dockerfile: Dockerfile, target: str) -> None:
    assert not dockerfile.of(target, "ENTRYPOINT")  # KubeRay brings commands of its own
    *serve, config = json.loads(dockerfile.of(target, "CMD")[-1])
    assert serve == ["serve", "run"]
    assert (ROOT / config).is_file()


def _context() -> list[str]:
    """What somebody's checkout may hold, beside what is in this one."""
    rubbish = [
        ".git/config", ".venv/lib/site.py", "build/lib/serve_app/cli.py", "keys.yaml", ".env",
        "unet.safetensors", "models/sdxl/unet/model.safetensors", "tests/conftest.py", "x.png",
        "serve_app/__pycache__/cli.cpython-311.pyc", "serve_app/engine/__pycache__/x.pyc",
        "diffusion_serve.egg-info/PKG-INFO", "images/Dockerfile", "configs-old/mine.yaml",
    ]  # fmt: skip
    files = [path for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts]
    return [*rubbish, *(path.relative_to(ROOT).as_posix() for path in files)]


def test_what_is_sent_to_the_builder_is_what_it_copies(ignored: Ignored) -> None:
    sent = [path for path in _context() if path not in ignored]
    kept = ("serve_app/", "configs/")
    files = {"LICENSE", "README.md", "constraints.txt", "pyproject.toml"}
    assert {path for path in sent if not path.startswith(kept)} == files
    assert not [path for path in sent if "__pycache__" in path or "egg-info" in path]
    wanted = [path for path in _context() if path.startswith(kept) and "__pycache__" not in path]
    assert set(wanted) <= set(sent)
    assert "serve_app/demo/model/unet/diffusion_pytorch_model.safetensors" in sent


@pytest.mark.parametrize(
    ("rules", "path", "out"),
    [
        ("*.md", "README.md", True),
        ("*.md", "docs/README.md", False),  # unlike git's rules: anchored at the root
        ("**/*.md", "docs/a/README.md", True),
        ("**/*.md", "README.md", True),
        ("docs", "docs/a/b.txt", True),
        ("/docs/", "docs/a/b.txt", True),
        ("*\n!docs", "docs/a/b.txt", False),  # unlike git's rules: out of a folder that is out
        ("*\n!docs\ndocs/a", "docs/a/b.txt", True),
        ("!docs\n*", "docs/a/b.txt", True),
        ("do?s", "docs", True),
        ("docs", "docs2", False),
        ("# docs", "docs", False),
    ],
)
def test_rules_are_read_as_docker_reads_them(rules: str, path: str, out: bool) -> None:
    assert (path in Ignored(rules)) is out
