"""Driver, torch and GPU: versions by NVIDIA's table, and the process that tries."""

import sys
from importlib.metadata import version
from pathlib import Path
from time import monotonic

import pytest

from serve_app.doctor import driver
from serve_app.doctor.driver import (
    TorchBuild,
    check_driver,
    check_torch,
    installed_torch,
    try_kernel,
)
from serve_app.doctor.gpus import Driver


@pytest.mark.parametrize(
    ("installed", "offers", "cuda", "outcome", "words"),
    [
        ("580.95.05", (13, 0), (13, 0), "ok", ""),
        ("595.45.04", (13, 2), (12, 6), "ok", ""),
        ("525.60.13", (12, 0), (12, 9), "ok", "minor version compatibility"),
        ("580.65.06", (13, 0), (13, 2), "ok", "minor version compatibility"),
        ("580.95.05", None, (13, 0), "ok", ""),
        ("575.57.08", (12, 9), (13, 0), "failed", "CUDA 13.x needs 580 or newer"),
        ("470.256.02", (11, 4), (12, 6), "failed", "CUDA 12.x needs 525 or newer"),
        ("575.57.08", None, (13, 0), "failed", "CUDA 13.x needs 580 or newer"),
        ("535.288.01", (13, 0), (13, 0), "warning", "cuda-compat"),
    ],
)
def test_drivers_follow_nvidias_table(
    installed: str,
    offers: tuple[int, int] | None,
    cuda: tuple[int, int],
    outcome: str,
    words: str,
) -> None:
    finding = check_driver(Driver(installed, offers), cuda)
    assert finding.outcome == outcome
    assert words in finding.found


def test_an_old_driver_gets_advice_on_a_torch_that_it_runs() -> None:
    finding = check_driver(Driver("550.54.15", (12, 4)), (13, 0))
    assert "Update the driver of the host to 580" in finding.advice
    assert "CUDA 12.x" in finding.advice
    assert "docs/operate/containers.md" in finding.advice


@pytest.mark.parametrize("installed", ["450.80.02", "470.256.02", "520.61.05"])
def test_advice_names_only_supported_builds_of_torch(installed: str) -> None:
    """torch 2.13 has no build for CUDA 11."""
    finding = check_driver(Driver(installed, (11, 4)), (13, 0))
    assert "CUDA 11" not in finding.advice
    assert "no build of the torch that this project needs" in finding.advice
    assert "older one than 525" in finding.advice


def test_torch_is_read_and_not_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = installed_torch()
    assert found is not None
    assert found.version.split("+")[0] == version("torch").split("+")[0]
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "version.py").write_text(
        "from typing import Optional\n__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)
    assert installed_torch() == TorchBuild("2.13.0+cu130", (13, 0))


def test_a_torch_for_the_cpu_is_a_failure_of_its_own() -> None:
    finding = check_torch(TorchBuild("2.13.0+cpu", None))
    assert finding.outcome == "failed"
    assert "pip install torch==2.13.0`" in finding.advice
    assert check_torch(TorchBuild("2.13.0", (13, 0))).outcome == "ok"
    assert check_torch(None).found == "not installed"


def _saying(program: str) -> list[str]:
    return [sys.executable, "-c", program]


@pytest.mark.slow
def test_a_kernel_runs_in_a_process_of_its_own() -> None:
    """On the CPU, which every machine has."""
    command = [sys.executable, "-m", "serve_app.doctor.kernel", "cpu"]
    finding = try_kernel(command)
    assert finding.outcome == "ok", finding
    assert finding.found == "torch computes on cpu"


@pytest.mark.slow
def test_a_failed_kernel_gives_the_reason() -> None:
    """Run the real program without a GPU, or with a device that does not exist."""
    finding = try_kernel([sys.executable, "-m", "serve_app.doctor.kernel", "cuda:99"])
    assert finding.outcome == "failed"
    assert "torch cannot use it: " in finding.found
    assert finding.advice


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("CUDA error: no kernel image is available for execution on the device", "generation"),
        ("Error 802: system not yet initialized", "nvidia-fabricmanager"),
        ("CUDA out of memory.", "Other processes use"),
        ("The NVIDIA driver on your system is too old (found version 11040)", "row `driver`"),
        ("CUDA-capable device(s) is/are busy or unavailable", "nvidia-smi -c DEFAULT"),
        ("libcudart.so.13: cannot open shared object file", "constraints.txt"),
        ("something new", "serve_app.doctor.kernel"),
    ],
)
def test_known_errors_have_their_own_advice(message: str, advice: str) -> None:
    finding = try_kernel(_saying(f"raise RuntimeError({message!r})"))
    assert finding.outcome == "failed"
    assert f"RuntimeError: {message}" in finding.found
    assert advice in " ".join(finding.advice.split())


def test_a_crash_is_reported() -> None:
    finding = try_kernel(_saying("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"))
    assert "killed by signal 11; it printed nothing" in finding.found


def test_a_process_that_finds_no_gpu_fails() -> None:
    assert "it finds no GPU" in try_kernel(_saying("")).found


def test_a_driver_that_hangs_does_not_hang_the_doctor() -> None:
    started_at = monotonic()
    finding = try_kernel(_saying("import time; time.sleep(600)"), timeout_s=0.5)
    assert monotonic() - started_at < 60
    assert "in 0.5 s" in finding.found
    assert "The driver hangs" in finding.advice


def test_the_table_knows_the_cuda_of_this_torch() -> None:
    """Raise `OLDEST_DRIVER` together with torch."""
    found = installed_torch()
    assert found is not None
    if found.cuda is not None:
        assert found.cuda[0] in driver.OLDEST_DRIVER
