"""The checks of KubeRay: CRDs, the operator, and its reports on services."""

from pathlib import Path

import pytest

from serve_app.doctor.kuberay import INSTALL
from tests.cluster.platform_rules import SECTION
from tests.doctor.cluster_checks import command_lines, findings_of
from tests.doctor.fake_cluster import (
    RAY,
    FakeApi,
    Object,
    operator,
    service,
    workload,
)
from tests.pages import KUBERNETES, section

ROOT = Path(__file__).parents[2]


def test_the_platforms_page_installs_kuberay_the_same_way() -> None:
    page = command_lines(section(ROOT, KUBERNETES, SECTION))
    assert len(command_lines(INSTALL)) == 2
    assert set(command_lines(INSTALL)) <= set(page)
    assert sum("install kuberay-operator" in line for line in page) == 1


def test_an_upgrade_is_of_the_release_that_is_there(api: FakeApi, kubeconfig: Path) -> None:
    api.put("deployments.apps", operator(":v1.5.1", release="kuberay-operator"))
    advice = command_lines(findings_of(kubeconfig)["KubeRay operator"].advice)
    install = command_lines(INSTALL)[1].replace(" install ", " upgrade ")
    assert advice[-1] == install.replace("kuberay-operator --create-namespace", "system")
    api.put("deployments.apps", operator(":v1.5.1", release="rays"))
    assert "helm upgrade rays kuberay/" in findings_of(kubeconfig)["KubeRay operator"].advice
    api.put("deployments.apps", operator(":v1.5.1"))
    advice_by_hand = findings_of(kubeconfig)["KubeRay operator"].advice
    assert "Helm did not install it" in advice_by_hand
    assert "helm upgrade" not in advice_by_hand
    assert "helm install" not in advice_by_hand


@pytest.mark.parametrize(
    ("served", "found", "advice"),
    [
        ({}, "no API group ray.io", "--namespace kuberay-operator --create-namespace"),
        ({"v1": ["rayclusters"]}, "ray.io/v1 has no rayservices; served are v1", "--server-side"),
        (
            {"v1alpha1": ["rayclusters", "rayservices"]},
            "has no rayservices and no rayclusters; served are v1alpha1",
            "--server-side",
        ),
    ],
)
def test_crds_must_be_served(
    api: FakeApi, kubeconfig: Path, served: dict[str, list[str]], found: str, advice: str
) -> None:
    api.ray = served
    finding = findings_of(kubeconfig)["KubeRay CRDs"]
    assert finding.outcome == "failed"
    assert found in finding.found
    assert advice in finding.advice


@pytest.mark.parametrize(
    ("operators", "outcome", "found", "advice"),
    [
        ([], "failed", "no deployment", "--namespace kuberay-operator --create-namespace"),
        ([operator(available=0)], "failed", "not available", "describe pod"),
        ([operator(":v1.5.1")], "failed", "older than 1.7.0", "helm show crds"),
        ([operator(":v1.8.0")], "warning", "newer than 1.7.0", "notes"),
        ([operator("@sha256:0")], "warning", "version is unknown", "Make sure"),
        ([operator(":v1.7.2")], "ok", "system/kuberay-operator", ""),
    ],
)
def test_the_operator_must_run_in_the_right_version(
    api: FakeApi, kubeconfig: Path, operators: list[Object], outcome: str, found: str, advice: str
) -> None:
    api.put("deployments.apps", workload("other", "nginx:1", {}), *operators)
    finding = findings_of(kubeconfig)["KubeRay operator"]
    assert finding.outcome == outcome
    assert found in finding.found
    assert advice in finding.advice


def _not_ready(reason: str, message: str) -> Object:
    ready = {"type": "Ready", "status": "False", "reason": reason, "message": message}
    return {"conditions": [ready]}


@pytest.mark.parametrize(
    ("status", "outcome", "found"),
    [
        ({}, "warning", "no status"),
        (_not_ready("Initializing", "waiting"), "failed", "not ready: Initializing waiting"),
        (
            {
                "pendingServiceStatus": {
                    "applicationStatuses": {
                        "app": {"status": "DEPLOY_FAILED", "message": "no such model"},
                        "other": {"status": "RUNNING"},
                    }
                }
            },
            "failed",
            "application app is DEPLOY_FAILED: no such model",
        ),
    ],
)
def test_kuberays_status_of_a_service_is_shown(
    api: FakeApi, kubeconfig: Path, status: Object, outcome: str, found: str
) -> None:
    api.put("rayservices.ray.io", service(status))
    finding = findings_of(kubeconfig)["RayService sdxl"]
    assert finding.outcome == outcome
    assert finding.found == found


@pytest.mark.parametrize("reason", ["ValidationFailed", "InitializingTimeout"])
def test_a_failed_service_is_reported_once(api: FakeApi, kubeconfig: Path, reason: str) -> None:
    api.put("rayservices.ray.io", service(_not_ready(reason, "why")))
    api.put("pods")
    findings = findings_of(kubeconfig)
    assert "why" in findings["RayService sdxl"].found
    assert ("kubectl -n images delete rayservice sdxl" in findings["RayService sdxl"].advice) == (
        reason == "InitializingTimeout"
    )
    assert "pods" not in findings


def test_pods_that_cannot_be_made_are_shown(api: FakeApi, kubeconfig: Path) -> None:
    failure = {
        "type": "ReplicaFailure",
        "status": "True",
        "reason": "FailedCreateWorkerPod",
        "message": 'tolerations[0].effect: Unsupported value: "NoSchedul"',
    }
    fine = {
        "metadata": {"name": "ok", "namespace": "images"},
        "status": {"conditions": [failure | {"status": "False"}]},
    }
    broken = {
        "metadata": {"name": "sdxl-1", "namespace": "images"},
        "status": {"conditions": [failure]},
    }
    api.put("rayclusters.ray.io", fine, broken)
    findings = findings_of(kubeconfig)
    assert "FailedCreateWorkerPod" in findings["RayCluster sdxl-1"].found
    assert "RayCluster ok" not in findings


def test_another_version_of_ray_is_a_warning(api: FakeApi, kubeconfig: Path) -> None:
    other = service()
    other["spec"]["rayClusterConfig"]["rayVersion"] = "2.9.0"
    api.put("rayservices.ray.io", other)
    finding = findings_of(kubeconfig)["Ray version"]
    assert finding.outcome == "warning"
    assert finding.found == f"sdxl has 2.9.0, this machine {RAY}"
