"""The checks of this machine, with faults that it does not have."""

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pynvml
import pytest
from huggingface_hub import constants

from serve_app.config.models import ModelConfig
from serve_app.config.source import DEMO_MODEL_DIR
from serve_app.doctor import driver
from serve_app.doctor.disk import check_disk, check_temporary_disk
from serve_app.doctor.driver import TorchBuild
from serve_app.doctor.gpus import Place
from serve_app.doctor.machine import Wanted, look
from serve_app.doctor.memory import check_memory, check_shared_memory, read_memory
from serve_app.doctor.report import Finding, ok
from serve_app.doctor.software import check_packages, check_probes, check_ray_cluster
from serve_app.doctor.weights import Component
from tests.doctor.fakes import GIB, FakeGpu, FakeNvml
from tests.doctor.test_weights import write_model

HOST = Place({}, device_files=True, container=False)
CONTAINER = Place({}, device_files=True, container=True)
POD = Place({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, device_files=True, container=True)
SDXL = ModelConfig(id="sdxl", path="owner/sdxl")


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Set the usage of every disk."""

    def set_usage(used: int, free: int) -> None:
        usage = Usage(used + free, used, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    return set_usage


@pytest.fixture
def cuda_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend a torch for GPUs and a kernel that runs."""
    monkeypatch.setattr(driver, "installed_torch", lambda: TorchBuild("2.13.0+cu130", (13, 0)))
    monkeypatch.setattr(driver, "try_kernel", lambda: ok("kernel", "torch computes on cuda:0"))


def _look(wanted: Wanted, place: Place, nvml: FakeNvml) -> dict[str, Finding]:
    findings = list(look([wanted], place, nvml))
    assert len({finding.check for finding in findings}) == len(findings)
    return {finding.check: finding for finding in findings}


@pytest.mark.usefixtures("cuda_torch")
def test_a_machine_that_has_all_it_needs_passes() -> None:
    findings = _look(Wanted(ModelConfig(), 1, cpu=False), HOST, FakeNvml())
    assert [name for name, finding in findings.items() if finding.outcome == "failed"] == []
    assert {"gpu 0", "gpu 0 MIG", "replica", "driver", "kernel", "gpu memory"} <= findings.keys()
    assert "bash and wget" not in str(findings)  # nobody probes a host


@pytest.mark.usefixtures("cuda_torch")
def test_an_old_driver_fails_and_the_kernel_is_tried_all_the_same() -> None:
    nvml = FakeNvml(driver="550.54.15", cuda=12040)
    findings = _look(Wanted(ModelConfig(), 1, cpu=False), HOST, nvml)
    assert findings["driver"].outcome == "failed"
    assert "kernel" in findings


def test_without_a_driver_no_other_gpu_check_runs() -> None:
    nvml = FakeNvml(init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    findings = _look(Wanted(ModelConfig(), 1, cpu=False), Place({}, False, False), nvml)
    assert findings["gpu"].outcome == "failed"
    assert not findings.keys() & {"torch", "driver", "kernel", "gpu memory"}


def test_a_torch_for_the_cpu_is_not_tried_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "installed_torch", lambda: TorchBuild("2.13.0+cpu", None))
    findings = _look(Wanted(ModelConfig(), 1, cpu=False), HOST, FakeNvml())
    assert findings["torch"].outcome == "failed"
    assert not findings.keys() & {"driver", "kernel"}


def test_with_cpu_no_gpu_is_checked() -> None:
    nvml = FakeNvml(init_error=pynvml.NVML_ERROR_UNKNOWN)
    findings = _look(Wanted(ModelConfig(), 0, cpu=True), HOST, nvml)
    assert findings["gpu"].outcome == "ok"
    assert findings["memory"].outcome == "ok"
    head = _look(Wanted(SDXL, 1, cpu=True), HOST, nvml)
    assert "which are elsewhere" in head["memory"].found
    assert "disk" not in head


@pytest.mark.usefixtures("cuda_torch")
@pytest.mark.parametrize(
    ("num_gpus", "outcome", "words"),
    [
        (1, "ok", "requests 1 GPUs, this machine has 2"),
        (0, "warning", "runs on the CPU"),
        (0.5, "warning", "several share one"),
        (3, "failed", "requests 3 GPUs, this machine has 2"),
    ],
)
def test_gpus_are_counted_as_ray_counts_them(num_gpus: float, outcome: str, words: str) -> None:
    nvml = FakeNvml([FakeGpu(), FakeGpu()])
    findings = _look(Wanted(ModelConfig(), num_gpus, cpu=False), HOST, nvml)
    assert findings["replica"].outcome == outcome
    assert words in findings["replica"].found
    assert ("gpu memory" in findings) == (num_gpus > 0)


@pytest.mark.usefixtures("cuda_torch")
def test_the_smallest_gpu_must_hold_the_model(tmp_path: Path) -> None:
    model = ModelConfig()
    nvml = FakeNvml([FakeGpu(), FakeGpu(total=1024, free=1024)])
    assert _look(Wanted(model, 1, cpu=False), HOST, nvml)["gpu memory"].outcome == "failed"
    nvml = FakeNvml([FakeGpu(memory_told=False)])
    assert _look(Wanted(model, 1, cpu=False), HOST, nvml)["gpu memory"].outcome == "warning"
    shutil.copytree(DEMO_MODEL_DIR, tmp_path / "model")
    (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    broken = ModelConfig(id="x", path=str(tmp_path / "model"))
    findings = _look(Wanted(broken, 1, cpu=False), HOST, FakeNvml())
    assert findings["model"].outcome == "failed"
    assert "has no weights" in findings["model"].found


@pytest.mark.usefixtures("cuda_torch")
def test_the_memory_of_a_missing_model_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    findings = _look(Wanted(SDXL, 1, cpu=False), HOST, FakeNvml())
    assert findings["gpu memory"].outcome == "warning"
    assert "is unknown" in findings["gpu memory"].found
    assert "hf download owner/sdxl" in findings["gpu memory"].advice


PARTS = [Component("text_encoder", 2 * GIB, 0), Component("transformer", 6 * GIB, 0)]
"""16 GiB in bfloat16, 10 with 8-bit weights, 12 in turns, 6 with both."""


@pytest.mark.parametrize(
    ("total", "free", "outcome", "advice"),
    [
        (48, 40, "ok", ""),
        (48, 18, "warning", "Little is left"),
        (48, 14, "failed", "Other processes use the missing memory"),
        (15, 15, "failed", "model.speed.offload: model (12.0 GiB), or model.speed.quantize: int8"),
        (11, 11, "failed", "a GPU with more memory, or set model.speed.quantize: int8 (10.0 GiB)"),
        (4, 4, "failed", "They cannot fit. Take a GPU with more memory."),
    ],
)
def test_memory_is_compared_and_fitting_options_are_named(
    total: int, free: int, outcome: str, advice: str
) -> None:
    memory = (total * GIB, free * GIB)
    finding = check_memory("gpu memory", ModelConfig(id="x", path="a/b"), PARTS, memory, True)
    assert finding.outcome == outcome
    assert advice in finding.advice


def test_halving_the_precision_is_named_where_it_is_full() -> None:
    model = ModelConfig(id="x", path="a/b", dtype="float32")
    finding = check_memory("gpu memory", model, PARTS, (20 * GIB, 20 * GIB), True)
    assert "set model.dtype: bfloat16 (16.0 GiB)" in finding.advice


def test_advice_for_a_cpu_names_no_gpu_options() -> None:
    finding = check_memory("memory", ModelConfig(id="x", path="a/b"), PARTS, (GIB, GIB), False)
    assert finding.outcome == "failed"
    assert "model.speed" not in finding.advice


def test_a_full_disk_fails(
    disk: Callable[[int, int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    disk(99 * GIB, GIB)
    finding = check_disk(SDXL)
    assert finding.outcome == "failed"
    assert "has 1.0 GiB free" in finding.found
    assert "point HF_HOME to a larger disk" in finding.advice
    assert check_disk(ModelConfig()).outcome == "ok"  # it is here
    full = check_temporary_disk(tmp_path)
    assert full.outcome == "failed"
    assert "99% full" in full.found
    assert "--temp-dir" in full.advice
    disk(40 * GIB, 60 * GIB)
    assert check_disk(SDXL).outcome == "ok"
    assert check_temporary_disk(tmp_path).outcome == "ok"


def test_weights_that_are_cached_need_no_room(
    disk: Callable[[int, int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--owner--sdxl" / "snapshots" / "main"
    write_model(folder)
    disk(99 * GIB, GIB)
    assert check_disk(SDXL).outcome == "ok"
    (folder / "model_index.json").write_text("{")
    assert check_disk(SDXL).outcome == "failed"


def test_a_cache_that_may_not_be_written_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    finding = check_disk(SDXL)
    assert finding.outcome == "failed"
    assert "fsGroup" in finding.advice


@pytest.mark.parametrize(
    ("place", "advice"),
    [
        (HOST, "remount"),
        (CONTAINER, "docker run --shm-size=11g"),
        (POD, "emptyDir: {medium: Memory}"),
    ],
)
def test_little_shared_memory_is_a_warning(
    disk: Callable[[int, int], None], place: Place, advice: str
) -> None:
    disk(0, 64 * 2**20)
    finding = check_shared_memory(128 * GIB, place)
    assert finding.outcome == "warning"
    assert "has 64 MiB, Ray's object store needs 9.3 GiB" in finding.found  # 10^10 bytes
    assert advice in finding.advice
    disk(0, 64 * GIB)
    assert check_shared_memory(128 * GIB, place).outcome == "ok"


def test_shared_memory_may_be_missing(tmp_path: Path) -> None:
    finding = check_shared_memory(GIB, HOST, tmp_path / "shm")
    assert finding.outcome == "warning"


def test_shared_memory_follows_rays_arithmetic(disk: Callable[[int, int], None]) -> None:
    """Compare with Ray's own arithmetic, for machines from small to large."""
    from ray._private import utils

    for memory_gib, shm_gib in ((2, 1), (8, 8), (64, 4), (512, 256), (2048, 1024)):
        disk(0, shm_gib * GIB)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(utils, "get_shared_memory_bytes", lambda size=shm_gib: size * GIB)
            store = utils.resolve_object_store_memory(memory_gib * GIB)
        outcome = check_shared_memory(memory_gib * GIB, HOST).outcome
        assert (outcome == "ok") == (shm_gib * GIB >= store), (memory_gib, shm_gib)


def test_packages_are_compared_with_the_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["ray[serve]~=2.60.0", "torch~=2.13.0", "no-such-extra; extra == 'quantize'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    finding = check_packages()
    assert finding.outcome == "ok"
    assert f"Python {platform.python_version()}" in finding.found
    asked += ["ray<2", "no-such-package"]
    finding = check_packages()
    assert finding.outcome == "failed"
    assert f"ray is {importlib.metadata.version('ray')}, not <2" in finding.found
    assert "no-such-package is missing" in finding.found


def test_a_project_that_is_not_installed_is_reported() -> None:
    assert check_packages("no-such-project").outcome == "warning"


def _place(address: str) -> Place:
    return Place({"RAY_ADDRESS": address}, device_files=False, container=False)


@pytest.mark.parametrize("address", ["", "local", "auto"])
def test_without_an_address_no_ray_cluster_is_checked(address: str) -> None:
    assert check_ray_cluster(_place(address)).outcome == "ok"
    assert check_ray_cluster(HOST).outcome == "ok"


def test_a_dashboards_address_is_a_warning() -> None:
    finding = check_ray_cluster(_place("http://head:8265"))
    assert finding.outcome == "warning"
    assert "HOST:6379" in finding.advice


@pytest.fixture
def head() -> Iterator[str]:
    """Listen on a port; the test decides Ray's answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_versions_of_a_cluster_are_compared(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the output of `head`; tests/e2e has a real cluster."""
    theirs = {
        "ray_version": importlib.metadata.version("ray"),
        "python_version": platform.python_version(),
    }

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command == [sys.executable, "-m", "serve_app.doctor.head", head]
        return subprocess.CompletedProcess(command, 0, json.dumps(theirs), "")

    monkeypatch.setattr(subprocess, "run", run)
    assert check_ray_cluster(_place(head)).outcome == "ok"
    theirs["python_version"] = "3.9.1"
    finding = check_ray_cluster(_place(head))
    assert finding.outcome == "failed"
    assert "Python 3.9.1; here Ray" in finding.found
    assert "same image" in finding.advice


def test_a_cluster_that_does_not_answer_fails(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(
            command, 1, "", "Traceback\nAuthenticationError: token\n"
        )

    monkeypatch.setattr(subprocess, "run", refuse)
    finding = check_ray_cluster(_place(head))
    assert finding.outcome == "failed"
    assert "does not answer: AuthenticationError: token" in finding.found

    def hang(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        raise subprocess.TimeoutExpired(command, 60)

    monkeypatch.setattr(subprocess, "run", hang)
    assert "no answer in 60 s" in check_ray_cluster(_place(head)).found


def test_an_address_without_a_listener_fails_at_once() -> None:
    assert "HOST:PORT" in check_ray_cluster(_place("head")).found
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    finding = check_ray_cluster(_place(address))
    assert finding.outcome == "failed"
    assert "refused" in finding.found
    assert f"ray status --address {address}" in finding.advice


@pytest.mark.parametrize(("place", "outcome"), [(CONTAINER, "warning"), (POD, "failed")])
def test_an_image_without_wget_fails_kuberays_probes(
    place: Place, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "wget" else f"/bin/{name}")
    finding = check_probes(place)
    assert finding.outcome == outcome
    assert finding.found.startswith("wget missing")
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert check_probes(place).outcome == "ok"


@pytest.mark.parametrize(
    ("limit", "used", "cached"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ],
)
def test_used_memory_of_a_container_is_not_free_and_its_cache_is(
    tmp_path: Path, limit: str, used: str, cached: str
) -> None:
    mib = 2**20
    (tmp_path / "memory").mkdir()
    (tmp_path / limit).write_text(f"{100 * mib}\n")
    (tmp_path / used).write_text(f"{90 * mib}\n")
    (tmp_path / used).with_name("memory.stat").write_text(f"anon 1\n{cached} {30 * mib}\n")
    assert read_memory(tmp_path) == (100 * mib, 40 * mib)
    (tmp_path / used).write_text(f"{140 * mib}\n")
    assert read_memory(tmp_path) == (100 * mib, 0)


def test_without_a_limit_the_machines_memory_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    total, free = read_memory(tmp_path)
    assert total == psutil.virtual_memory().total
    assert 0 < free <= total
