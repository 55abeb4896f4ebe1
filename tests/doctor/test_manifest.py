"""Checks of a rendered manifest without a cluster."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from serve_app.doctor.manifest import look
from serve_app.doctor.report import Finding
from tests.cluster.manifests import render

ROOT = Path(__file__).parents[2]
Object = dict[str, Any]


@pytest.fixture(scope="module")
def rendered() -> list[Object]:
    return render(ROOT / "cluster/overlays/production").documents


@pytest.fixture
def service(rendered: list[Object]) -> Object:
    [service] = [one for one in rendered if one["kind"] == "RayService"]
    return deepcopy(service)


def _look(*objects: Object) -> dict[str, Finding]:
    found = list(look(objects))
    assert len({finding.check for finding in found}) == len(found)
    return {finding.check: finding for finding in found}


def test_a_valid_manifest_shows_its_chain(rendered: list[Object]) -> None:
    found = _look(*rendered)
    assert {finding.outcome for finding in found.values()} == {"ok"}
    assert found["diffusion-serve operator"].found.startswith("passes the ")
    assert "420 < graceful_shutdown_timeout_s of Gateway 430" in (
        found["diffusion-serve deadlines"].found
    )


def test_each_refusal_and_each_misorder_is_a_row(service: Object) -> None:
    del service["spec"]["rayClusterConfig"]["autoscalerOptions"]["version"]
    service["spec"]["rayClusterConfig"]["upgradeStrategy"] = {"type": "Recreate"}
    del service["spec"]["rayClusterDeletionDelaySeconds"]
    found = _look(service)
    assert list(found) == [
        "diffusion-serve rejected 1",
        "diffusion-serve rejected 2",
        "diffusion-serve deadlines",
        "diffusion-serve replicas",
    ]
    assert [finding.outcome for finding in found.values()] == ["failed"] * 3 + ["ok"]
    first = found["diffusion-serve rejected 1"]
    assert "workerGroupSpecs[gpu].idleTimeoutSeconds is 120" in first.found
    assert "autoscalerOptions.version to v2" in first.advice
    last = found["diffusion-serve deadlines"]
    assert last.found.startswith("spec.rayClusterDeletionDelaySeconds is 60, not over")


def test_a_wrong_serve_config_is_a_row(service: Object) -> None:
    service["spec"]["serveConfigV2"] = ""
    assert "no application with import_path" in _look(service)["diffusion-serve deadlines"].found


def test_advice_on_a_feature_gate_names_its_setting(service: Object) -> None:
    service["spec"]["rayClusterConfig"]["networkPolicy"] = {"mode": "DenyAll"}
    finding = _look(service)["diffusion-serve rejected"]
    assert "RayClusterNetworkPolicy is off by default" in finding.found
    assert "cluster/platform/kuberay-operator.yaml" in finding.advice
