"""The command, on this machine as it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve_app.cli import cli
from serve_app.doctor.machine import this_place
from tests.cluster.manifests import render
from tests.doctor.fake_cluster import FakeApi, service
from tests.doctor.rehearsal.fake_operator import OperatorApi
from tests.doctor.rehearsal.rehearsals import service as rehearsed

ROOT = Path(__file__).parents[2]
PROGRAM = Path(sys.executable).with_name("diffusion-serve")
without_gpu = pytest.mark.skipif(this_place().device_files, reason="this machine has a GPU")


def _doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, "doctor", *arguments],
        capture_output=True, text=True, timeout=480, check=False,
        env=os.environ | environment,
    )  # fmt: skip


@without_gpu
def test_a_missing_gpu_is_reported() -> None:
    done = _doctor()
    assert done.returncode == 1, done.stderr
    assert "no NVIDIA driver" in done.stdout
    assert "--cpu" in done.stdout
    assert done.stderr == ""


def test_where_no_gpu_is_expected_it_passes() -> None:
    done = _doctor("--cpu", "--config", str(ROOT / "configs" / "demo.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout


@without_gpu
def test_programs_read_json() -> None:
    done = _doctor("--json", "--config", str(ROOT / "configs" / "sdxl.yaml"))
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert document["ok"] is False
    outcomes = {finding["check"]: finding["outcome"] for finding in document["findings"]}
    assert outcomes["gpu"] == "failed"
    assert outcomes["packages"] == "ok"


@without_gpu
def test_neither_torch_nor_ray_is_waited_for() -> None:
    program = (
        "import atexit, sys; from serve_app.cli import cli;"
        "atexit.register(lambda: print({'torch', 'ray', 'diffusers'} & set(sys.modules)));"
        "cli(['doctor'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=480, check=False
    )
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "set()"


def test_a_cluster_is_found_through_kubeconfig(api: FakeApi, tmp_path: Path) -> None:
    api.put("rayservices.ray.io", service(pod={"tolerations": []}))
    done = _doctor("--cluster", KUBECONFIG=str(api.kubeconfig(tmp_path)))
    assert done.returncode == 1, done.stderr
    assert "namespace images" in done.stdout
    assert "{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}" in done.stdout
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(json.dumps(service()))
    arguments = ("--cluster", "--overlay", str(manifest))
    mended = _doctor(*arguments, KUBECONFIG=str(api.kubeconfig(tmp_path)))
    assert mended.returncode == 0, mended.stdout
    piped = subprocess.run(
        [PROGRAM, "doctor", "--cluster", "--overlay", "-"], input=manifest.read_text(),
        capture_output=True, text=True, timeout=480, check=False,
        env=os.environ | {"KUBECONFIG": str(api.kubeconfig(tmp_path))},
    )  # fmt: skip
    assert piped.stdout == mended.stdout


def test_without_a_cluster_there_is_no_traceback(tmp_path: Path) -> None:
    done = _doctor("--cluster", KUBECONFIG=str(tmp_path / "none"))
    assert done.returncode == 1
    assert "no cluster is configured" in done.stdout
    assert done.stderr == ""


def test_a_manifest_needs_no_cluster_and_no_client_for_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    rendered = render(ROOT / "cluster/overlays/single-gpu").service
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(json.dumps(rendered))
    result = CliRunner().invoke(cli, ["doctor", "--overlay", str(manifest)])
    assert result.exit_code == 0, result.output
    del rendered["spec"]["rayClusterConfig"]["autoscalerOptions"]["version"]
    refused = CliRunner().invoke(cli, ["doctor", "--overlay", "-"], input=json.dumps(rendered))
    assert refused.exit_code == 1
    words = " ".join(refused.output.split())
    assert "Set spec.rayClusterConfig.enableInTreeAutoscaling to true and" in words
    assert "autoscalerOptions.version to v2" in words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "/no/such.yaml"], "/no/such.yaml cannot be read"),
        (["--namespace", "x"], "needs --cluster"),
        (["--namespace", "x", "--overlay", "-"], "needs --cluster"),
        (["--cluster", "--config", "x.yaml"], "--config checks a machine"),
        (["--overlay", "-", "--config", "x.yaml"], "--config checks a machine"),
        (["--overlay", "/no/such.yaml"], "/no/such.yaml cannot be read"),
        (["--cluster", "--overlay", "/no/such.yaml"], "/no/such.yaml cannot be read"),
        (["--rehearse"], "--rehearse needs --cluster and --overlay"),
        (["--cluster", "--rehearse"], "--rehearse needs --cluster and --overlay"),
        (["--cluster", "--overlay", "/no/such.yaml", "--rehearse"], "cannot be read"),
    ],
)
def test_mistakes_end_with_2(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(cli, ["doctor", *arguments])
    assert result.exit_code == 2
    assert words in result.output


def test_a_wrong_number_of_gpus_is_a_mistake(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    text = (ROOT / "configs" / "sdxl.yaml").read_text()
    config.write_text(text.replace("num_gpus: 1", "num_gpus: one"))
    result = CliRunner().invoke(cli, ["doctor", "--config", str(config)])
    assert result.exit_code == 2
    assert "ray_actor_options.num_gpus must be a number" in result.output


def test_the_client_for_clusters_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    result = CliRunner().invoke(cli, ["doctor", "--cluster"])
    assert result.exit_code == 2
    assert "pip install -c constraints.txt -e '.[cluster]'" in " ".join(result.output.split())


def test_a_rehearsal_prints_its_steps_beside_the_result(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(json.dumps(rehearsed()))
    with OperatorApi().serving() as api:
        assert isinstance(api, OperatorApi)
        api.forbidden = {("POST", "namespaces")}
        environment = {"KUBECONFIG": str(api.kubeconfig(tmp_path))}
        arguments = ("--cluster", "--overlay", str(manifest), "--rehearse", "--json")
        done = _doctor(*arguments, **environment)
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    assert [one["check"] for one in document["findings"] if one["outcome"] == "failed"] == ["apply"]
    assert "1/10 preflight" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_rehearsal_overwrites_nothing_that_a_cluster_shares(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": "x"},
    }
    manifest.write_text(json.dumps(role) + "\n---\n" + json.dumps(rehearsed()))
    with OperatorApi().serving() as api:
        assert isinstance(api, OperatorApi)
        environment = {"KUBECONFIG": str(api.kubeconfig(tmp_path))}
        arguments = ("--cluster", "--overlay", str(manifest), "--rehearse")
        done = _doctor(*arguments, **environment)
        assert api.writes == []
    assert done.returncode == 2
    assert "ClusterRole x" in done.stderr
