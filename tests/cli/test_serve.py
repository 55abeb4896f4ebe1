"""``diffusion-serve serve``: the config that it makes, its mistakes, and a real server."""

import base64
import io
import signal
import socket
import subprocess
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pynvml
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from serve_app.cli import cli
from serve_app.cli.serve import count_gpus
from tests.cli.server import PROGRAM, serving
from tests.serve_process import free_port
from tests.tiny_pipelines import sdxl
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def _serve(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["serve", *arguments])


def _printed(*arguments: str) -> dict[str, Any]:
    result = _serve(*arguments, "--print-config")
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = yaml.safe_load(result.stdout)
    return content


@pytest.mark.parametrize("model", ["no-such-folder", "./no-such-folder", "/no/such/folder"])
def test_a_model_that_is_not_there_ends_within_3_s(tmp_path: Path, model: str) -> None:
    started_at = monotonic()
    done = subprocess.run(
        [PROGRAM, "serve", "--model", model],
        cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    took_s = monotonic() - started_at
    assert done.returncode == 2
    assert model in done.stderr
    assert "owner/name" in done.stderr
    assert not done.stdout
    assert took_s < 3.0


def test_a_checkpoint_file_is_checked_before_a_start(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    result = _serve("--model", str(path), "--device", "cpu")
    assert result.exit_code == 2
    assert "has no weights, it is empty" in result.stderr


def test_the_printed_config_passes_check(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    options = ["--model", "org/name", "--device", "cuda", "--dtype", "float16", "--port", "8123"]
    content = _printed(*options, "--max-replicas", "4", "--host", "0.0.0.0")
    path.write_text(yaml.safe_dump(content))
    checked = CliRunner().invoke(cli, ["check", str(path)])
    assert checked.exit_code == 0, checked.output
    assert content["http_options"] == {"host": "0.0.0.0", "port": 8123}
    [application] = content["applications"]
    assert application["args"]["model"] == {"id": "org/name", "device": "cuda", "dtype": "float16"}
    [generator] = application["deployments"]
    assert generator["ray_actor_options"]["num_gpus"] == 1
    assert generator["autoscaling_config"]["max_replicas"] == 4
    # The file is accepted as it is.
    assert _printed(str(path), "--port", "8123", "--host", "0.0.0.0") == content


def test_the_demo_runs_on_a_cpu_where_there_is_no_gpu() -> None:
    [application] = _printed()["applications"]
    assert application["args"]["model"] == {"id": "demo", "device": "cpu"}
    [generator] = application["deployments"]
    assert generator["ray_actor_options"]["num_gpus"] == 0
    assert "autoscaling_config" not in generator


def test_another_model_does_not_run_on_a_cpu_unless_the_operator_chooses_it() -> None:
    result = _serve("--model", "org/name", "--print-config")
    assert result.exit_code == 2
    assert "no usable NVIDIA GPU" in result.stderr
    assert "--device cpu" in result.stderr
    [application] = _printed("--model", "org/name", "--device", "cpu")["applications"]
    assert application["args"]["model"] == {"id": "org/name", "device": "cpu"}


def test_a_config_that_needs_a_gpu_is_rejected_where_there_is_none() -> None:
    result = _serve(str(ROOT / "configs" / "sdxl.yaml"))
    assert result.exit_code == 2
    assert "requests 1 GPU" in result.stderr


def test_a_gpu_of_a_running_cluster_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    [application] = _printed("--model", "org/name")["applications"]
    assert application["args"]["model"]["device"] == "cuda"


def test_a_config_file_listens_on_this_machine_only() -> None:
    path = ROOT / "configs" / "demo.yaml"
    assert yaml.safe_load(path.read_text())["http_options"]["host"] == "0.0.0.0"
    assert _printed(str(path))["http_options"] == {"host": "127.0.0.1", "port": 8000}


def test_a_config_file_and_a_model_exclude_each_other() -> None:
    result = _serve(str(ROOT / "configs" / "demo.yaml"), "--model", "demo")
    assert result.exit_code == 2
    assert "Leave them out" in result.stderr


def test_a_wrong_config_file_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text((ROOT / "configs" / "demo.yaml").read_text().replace("max_steps", "max_stepz"))
    result = _serve(str(path))
    assert result.exit_code == 2
    assert "max_stepz: unknown key" in result.stderr


def test_a_port_in_use_is_rejected() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = _serve("--model", "demo", "--device", "cpu", "--port", str(port))
    assert result.exit_code == 2
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr
    assert "--port" in result.stderr


def _generate(url: str, **body: Any) -> Image.Image:
    answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=480)
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))


@pytest.mark.serve
def test_a_folder_of_a_model_is_served_without_a_config_file(tmp_path: Path) -> None:
    folder, port = tmp_path / "tiny-sdxl", free_port()
    sdxl().save_pretrained(folder)
    url = f"http://127.0.0.1:{port}"
    options = ["--model", str(folder), "--device", "cpu", "--port", str(port)]
    with serving(options, cwd=tmp_path) as running:
        running.wait_until_ready(url)
        models = httpx.get(f"{url}/v1/models", timeout=20).json()["data"]
        assert [model["id"] for model in models] == ["tiny-sdxl"]
        image = _generate(url, prompt="a cat", num_inference_steps=2, size="48x32", seed=1)
        assert image.size == (48, 32)
        # Serve's proxies have this project's middlewares: their errors are JSON objects.
        lost = httpx.get(f"{url}/no/such/path", timeout=20)
        assert lost.headers["content-type"].startswith("application/json")
        assert len(lost.headers["x-request-id"]) > 0
        running.process.send_signal(signal.SIGINT)
        wait_until(lambda: running.process.poll() is not None, 60, what="the end after Ctrl-C")
        assert running.process.returncode == 0, running.log.read_text()
        assert "Traceback" not in running.log.read_text()
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/ready", timeout=5)


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, 2), ("0", 1), ("0,1", 2), ("", 0), ("-1", 0), ("0,1,2,3", 2)]
)
def test_gpus_are_those_that_processes_may_use(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: int
) -> None:
    """On a machine with two GPUs; the driver's library stands in for them."""
    for name in ("nvmlInit", "nvmlShutdown"):
        monkeypatch.setattr(pynvml, name, lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus() == expected


def test_http_options_that_are_no_mapping_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("http_options: 8000\napplications: [{import_path: 'serve_app.app:build'}]\n")
    result = _serve(str(path))
    assert result.exit_code == 2
    assert "http_options must be a mapping" in result.output
