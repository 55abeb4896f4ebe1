"""Existing Gateways, and whether traffic can enter."""

from pathlib import Path

import pytest

from serve_app.doctor.cluster import look
from serve_app.doctor.kube import Cluster
from serve_app.doctor.report import Finding
from tests.doctor.fake_cluster import (
    FakeApi,
    Object,
    operator,
    service,
    workload,
)
from tests.doctor.fake_gateways import GATEWAYS, condition, gateway, gateway_class, incremental

ACCEPTED = condition("Accepted", "True", "Accepted")
PROGRAMMED = condition("Programmed", "True", "Programmed")
RESOURCE = "gateways.gateway.networking.k8s.io"


@pytest.fixture(autouse=True)
def _gateway_api(api: FakeApi) -> None:
    api.kinds |= GATEWAYS
    api.put("rayservices.ray.io", incremental(service()))
    api.put("gatewayclasses.gateway.networking.k8s.io", gateway_class("eg-internal", ACCEPTED))
    api.put("deployments.apps", operator(), _envoy(available=1))


def _envoy(available: int) -> Object:
    one = workload(
        "envoy-gateway", "docker.io/envoyproxy/gateway:v1.9.1", {"availableReplicas": available}
    )
    one["metadata"]["namespace"] = "envoy-gateway-system"
    return one


def _look(kubeconfig: Path) -> dict[str, Finding]:
    with Cluster(None, kubeconfig) as cluster:
        return {finding.check: finding for finding in look(cluster, cpu=False)}


def test_a_programmed_gateway_passes_with_its_address(api: FakeApi, kubeconfig: Path) -> None:
    api.put(RESOURCE, gateway("sdxl-gateway", ACCEPTED, PROGRAMMED, address="10.0.0.7"))
    findings = _look(kubeconfig)
    assert {finding.outcome for finding in findings.values()} == {"ok"}
    assert findings["Gateway sdxl-gateway"].found == "programmed, 10.0.0.7"


@pytest.mark.parametrize(
    ("conditions", "found", "advice"),
    [
        (
            [ACCEPTED, condition("Programmed", "False", "AddressNotAssigned", "none")],
            "not programmed: AddressNotAssigned: none",
            "LoadBalancer",
        ),
        (
            [ACCEPTED, condition("Programmed", "False", "NoResources", "0 envoy")],
            "not programmed: NoResources: 0 envoy",
            "owning-gateway-name=sdxl-gateway",
        ),
        (
            [condition("Accepted", "False", "InvalidParameters", "no EnvoyProxy")],
            "not accepted: InvalidParameters: no EnvoyProxy",
            "describe gateway sdxl-gateway",
        ),
        (
            [condition("Programmed", "Unknown", "Pending", "Waiting for controller")],
            "not programmed: Pending: Waiting for controller",
            "kubectl -n envoy-gateway-system get deployments,pods,services",
        ),
        ([], "not programmed: no controller has handled it", "kubectl get gatewayclasses"),
    ],
)
def test_a_gateway_that_is_not_programmed_fails_although_the_service_is_ready(
    api: FakeApi, kubeconfig: Path, conditions: list[Object], found: str, advice: str
) -> None:
    api.put(RESOURCE, gateway("sdxl-gateway", *conditions))
    findings = _look(kubeconfig)
    finding = findings["Gateway sdxl-gateway"]
    assert (finding.outcome, finding.found) == ("failed", found)
    assert advice in finding.advice
    assert findings["RayService sdxl"].outcome == "ok"


@pytest.mark.parametrize(
    ("deployments", "advice"),
    [
        ([operator()], "Envoy Gateway, which answers for it, is not there"),
        ([operator(), _envoy(available=0)], "is not available:\n  kubectl -n envoy-gateway-system"),
    ],
)
def test_a_controller_that_does_not_run_is_the_cause(
    api: FakeApi, kubeconfig: Path, deployments: list[Object], advice: str
) -> None:
    api.put("deployments.apps", *deployments)
    api.put(RESOURCE, gateway("sdxl-gateway"))
    assert advice in _look(kubeconfig)["Gateway sdxl-gateway"].advice


def test_a_class_of_another_controller_is_not_envoys(api: FakeApi, kubeconfig: Path) -> None:
    theirs = gateway_class("eg-internal", ACCEPTED)
    theirs["spec"]["controllerName"] = "example.com/gateways"
    api.put("gatewayclasses.gateway.networking.k8s.io", theirs)
    api.put(RESOURCE, gateway("sdxl-gateway"))
    finding = _look(kubeconfig)["Gateway sdxl-gateway"]
    assert finding.advice.startswith("Check that example.com/gateways runs")


def test_a_gateway_that_kuberay_has_not_created_fails(api: FakeApi, kubeconfig: Path) -> None:
    api.put(RESOURCE)
    finding = _look(kubeconfig)["Gateway sdxl-gateway"]
    assert finding.outcome == "failed"
    assert "RayServiceIncrementalUpgrade" in finding.advice


def test_other_gateways_of_the_namespace_count_as_well(api: FakeApi, kubeconfig: Path) -> None:
    api.put("rayservices.ray.io", service())
    api.put(RESOURCE, gateway("way-in", ACCEPTED, condition("Programmed", "False", "Invalid")))
    findings = _look(kubeconfig)
    assert findings["Gateway way-in"].found == "not programmed: Invalid"
    assert "Gateway sdxl-gateway" not in findings


def test_forbidden_gateways_fail_with_the_command_that_grants_them(
    api: FakeApi, kubeconfig: Path
) -> None:
    api.refusals = {RESOURCE: 403}
    finding = _look(kubeconfig)["Gateways"]
    assert finding.outcome == "failed"
    assert RESOURCE in finding.advice
