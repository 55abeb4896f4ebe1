"""The checks of a machine on which several models, or several replicas, are to run together."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pynvml
import pytest
import yaml
from huggingface_hub import constants

from serve_app.cli import doctor as command
from serve_app.config.models import ModelConfig
from serve_app.config.source import DEMO_MODEL_DIR
from serve_app.doctor import driver, machine
from serve_app.doctor.driver import TorchBuild
from serve_app.doctor.gpus import Place
from serve_app.doctor.machine import Wanted, look
from serve_app.doctor.report import Finding
from tests.doctor.fakes import GIB, FakeGpu, FakeNvml
from tests.doctor.test_machine import HOST, SDXL, Usage

OTHER = ModelConfig(id="other", path="owner/other")
CLUSTER = Place({"RAY_ADDRESS": "ray://head:10001"}, device_files=True, container=False)


@pytest.fixture(autouse=True)
def cpu_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend a torch whose driver and kernel are not tried."""
    monkeypatch.setattr(driver, "installed_torch", lambda: TorchBuild("2.13.0+cpu", None))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the free space of an empty cache."""

    def set_free(free: int) -> None:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * GIB, 0, free))

    return set_free


def demo(name: str) -> ModelConfig:
    return ModelConfig(id=name, path=str(DEMO_MODEL_DIR))


def _look(wanted: Sequence[Wanted], place: Place, nvml: FakeNvml) -> dict[str, Finding]:
    findings = list(look(wanted, place, nvml))
    assert len({finding.check for finding in findings}) == len(findings)
    return {finding.check: finding for finding in findings}


@pytest.mark.parametrize(
    ("requests", "devices", "place", "outcome", "words"),
    [
        ([(1, 1), (1, 1)], 1, HOST, "failed", "request 2 GPUs together, this machine has 1"),
        ([(1, 1), (1, 1)], 1, CLUSTER, "warning", "request 2 GPUs together, this machine has 1"),
        ([(1, 1), (1, 1)], 2, HOST, "ok", "this machine has 2"),
        ([(0.5, 1), (0.5, 1)], 1, HOST, "ok", "this machine has 1"),
        ([(1, 2), (0, 1)], 1, HOST, "failed", "request 2 GPUs together, this machine has 1"),
        ([(1, 1), (1, 0)], 1, HOST, "warning", "each model requests 2 GPUs together"),
        ([(1, 0), (1, 0)], 1, HOST, "warning", "each model requests 2 GPUs together"),
        ([(1, 3)], 2, HOST, "failed", "request 3 GPUs together, this machine has 2"),
        ([(1, 1)], 1, HOST, None, ""),
    ],
)
def test_the_gpus_of_all_replicas_are_added_up(
    requests: list[tuple[float, int]], devices: int, place: Place, outcome: str, words: str
) -> None:
    wanted = [
        Wanted(demo(f"model-{index}"), num_gpus, cpu=False, replicas=replicas)
        for index, (num_gpus, replicas) in enumerate(requests)
    ]
    findings = _look(wanted, place, FakeNvml([FakeGpu() for _ in range(devices)]))
    if outcome is None:
        assert "replicas" not in findings
        return
    assert findings["replicas"].outcome == outcome
    assert words in findings["replicas"].found


def test_each_finding_of_a_model_names_it() -> None:
    wanted = [Wanted(demo(name), 1, cpu=False) for name in ("one", "two")]
    findings = _look(wanted, HOST, FakeNvml([FakeGpu(), FakeGpu(total=1024, free=1024)]))
    for name in ("one", "two"):
        assert findings[f"{name}: replica"].outcome == "ok"
        assert findings[f"{name}: gpu memory"].outcome == "failed"
    assert not findings.keys() & {"replica", "gpu memory"}
    on_cpu = _look([Wanted(one.model, 0, cpu=True) for one in wanted], HOST, FakeNvml())
    assert on_cpu["one: memory"].outcome == on_cpu["two: memory"].outcome == "ok"


def test_the_room_for_all_downloads_is_added_up(cache: Callable[[int], None]) -> None:
    both = [Wanted(model, 1, cpu=False) for model in (SDXL, OTHER)]
    same = [Wanted(SDXL, 1, cpu=False), Wanted(SDXL.model_copy(update={"id": "b"}), 1, cpu=False)]
    nvml = FakeNvml([FakeGpu(), FakeGpu()])
    cache(15 * GIB)
    disk = _look(both, HOST, nvml)["disk"]
    assert disk.outcome == "failed"
    assert "for owner/sdxl, owner/other; even small models need 20.0 GiB" in disk.found
    assert _look(same, HOST, nvml)["disk"].outcome == "ok"  # downloaded once
    cache(25 * GIB)
    assert _look(both, HOST, nvml)["disk"].outcome == "ok"


def test_the_disk_is_checked_without_a_driver(cache: Callable[[int], None]) -> None:
    cache(15 * GIB)
    nvml = FakeNvml(init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    findings = _look([Wanted(model, 1, cpu=False) for model in (SDXL, OTHER)], HOST, nvml)
    assert findings["gpu"].outcome == findings["disk"].outcome == "failed"


@pytest.mark.parametrize(
    ("settings", "replicas"),
    [
        ({}, 1),
        ({"num_replicas": 2}, 2),
        ({"num_replicas": "auto"}, 1),
        ({"autoscaling_config": {"min_replicas": 0, "max_replicas": 1}}, 0),
    ],
)
def test_the_replicas_are_those_of_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], replicas: int
) -> None:
    application = {
        "import_path": "serve_app.app:build",
        "args": {"model": {"id": "demo"}},
        "deployments": [{"name": "Generator"} | settings],
    }
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump({"applications": [application]}))
    seen: list[Wanted] = []

    def note(wanted: Sequence[Wanted], place: Place) -> list[Finding]:
        seen.extend(wanted)
        return []

    monkeypatch.setattr(machine, "look", note)
    command._look_at_machine(path, cpu=False)
    assert [one.replicas for one in seen] == [replicas]
