"""The wheel, installed without the clone: it generates an image and serves."""

import base64
import io
import sys
import sysconfig
import zipfile
from pathlib import Path

import httpx
import pytest
from PIL import Image

from serve_app import __version__
from tests.cli.server import serving
from tests.serve_process import free_port
from tests.wheel import build_wheel, run


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """Install the wheel beside this environment's dependencies; return its ``diffusion-serve``.

    A .pth file adds the folder of the dependencies to ``sys.path``. The editable install of the
    clone does not come along: Python reads .pth files of site folders only, and this is none.
    """
    folder = tmp_path_factory.mktemp("installed") / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    site = Path(
        run(
            [folder / "bin" / "python", "-c", "import site; print(site.getsitepackages()[0])"],
            folder,
        ).strip()
    )
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(
        [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install",
         "--no-deps", "--no-index", wheel],
        folder,
    )  # fmt: skip
    return folder / "bin" / "diffusion-serve"


def test_the_wheel_has_the_files_of_a_server_and_no_others(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    metadata = f"diffusion_serve-{__version__}.dist-info/METADATA"
    for name in (
        "serve_app/py.typed",
        "serve_app/gateway/page/index.html",
        "serve_app/gateway/page/main.js",
        "serve_app/demo/model/unet/diffusion_pytorch_model.safetensors",
        metadata,
    ):
        assert name in names
    folders = {name.split("/")[0] for name in names}
    assert folders == {"serve_app", metadata.split("/")[0]}


@pytest.mark.slow
def test_the_wheel_generates_an_image_outside_the_clone(program: Path, tmp_path: Path) -> None:
    where = "import serve_app, sys; print(serve_app.__file__)"
    path = run([program.with_name("python"), "-c", where], tmp_path).strip()
    assert Path(path).is_relative_to(program.parents[1])
    prompt = ["--prompt", "a red circle on a blue background", "--steps", "2"]
    run([program, "infer", *prompt, "--output", "image.png"], tmp_path)
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
        answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=240)
        assert answer.status_code == 200, answer.text
        data = base64.b64decode(answer.json()["data"][0]["b64_json"])
        assert Image.open(io.BytesIO(data)).size == (64, 64)
        assert "<title>" in httpx.get(url, timeout=20).text
