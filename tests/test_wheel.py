"""The wheel, installed without the clone: it generates an image and serves."""

import base64
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from PIL import Image

from serve_app import __version__
from tests.cli.server import serving
from tests.e2e.conftest import free_port

ROOT = Path(__file__).parents[1]


def _run(command: list[str | Path], cwd: Path, variables: Mapping[str, str]) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """This environment without the variables that lead to the clone."""
    names = ("PYTHONPATH", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in names}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, environment: Mapping[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # A copy: setuptools leaves a build folder behind, whose old files get into the next wheel.
    source.mkdir()
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(
        ROOT / "serve_app", source / "serve_app", ignore=shutil.ignore_patterns("__pycache__")
    )
    command: list[str | Path] = [sys.executable, "-m", "pip", "wheel", "--no-deps"]
    if find_spec("setuptools") is not None:
        command += ["--no-build-isolation", "--no-index"]
    _run([*command, "--wheel-dir", folder, source], folder, environment)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def program(
    tmp_path_factory: pytest.TempPathFactory, wheel: Path, environment: Mapping[str, str]
) -> Path:
    """``diffusion-serve`` of an environment that has the wheel, and this one's dependencies.

    A .pth file adds the folder of the dependencies to ``sys.path``. The editable install of the
    clone does not come along: Python reads .pth files of site folders only, and this is none.
    """
    folder = tmp_path_factory.mktemp("installed") / "venv"
    _run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent, environment)
    site = Path(
        _run(
            [folder / "bin" / "python", "-c", "import site; print(site.getsitepackages()[0])"],
            folder,
            environment,
        ).strip()
    )
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _run(
        [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install",
         "--no-deps", "--no-index", wheel],
        folder, environment,
    )  # fmt: skip
    return folder / "bin" / "diffusion-serve"


def test_the_wheel_has_what_a_server_needs_and_no_more(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    metadata = f"diffusion_serve-{__version__}.dist-info/METADATA"
    for name in (
        "serve_app/py.typed",
        "serve_app/gateway/page/index.html",
        "serve_app/demo/model/unet/diffusion_pytorch_model.safetensors",
        metadata,
    ):
        assert name in names
    folders = {name.split("/")[0] for name in names}
    assert folders == {"serve_app", metadata.split("/")[0]}


def test_the_wheel_generates_an_image_outside_the_clone(
    program: Path, tmp_path: Path, environment: Mapping[str, str]
) -> None:
    where = "import serve_app, sys; print(serve_app.__file__)"
    path = _run([program.with_name("python"), "-c", where], tmp_path, environment).strip()
    assert Path(path).is_relative_to(program.parents[1])
    prompt = ["--prompt", "a red circle on a blue background", "--steps", "2"]
    _run([program, "infer", *prompt, "--output", "image.png"], tmp_path, environment)
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (64, 64)


@pytest.mark.serve
def test_the_wheel_serves_the_demo_outside_the_clone(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = ["--model", "demo", "--device", "cpu", "--port", str(port)]
    with serving(options, program, tmp_path) as running:
        running.wait_until_ready(url)
        body = {"prompt": "a green ring on white", "num_inference_steps": 2}
        answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        data = base64.b64decode(answer.json()["data"][0]["b64_json"])
        assert Image.open(io.BytesIO(data)).size == (64, 64)
        assert "<title>" in httpx.get(url, timeout=20).text
