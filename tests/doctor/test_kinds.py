"""Kinds that the API server must serve before an overlay is applied."""

from pathlib import Path

import pytest

from serve_app.doctor.cluster import look
from serve_app.doctor.kinds import INSTALL_GATEWAY, INSTALL_MONITORING
from serve_app.doctor.kube import Cluster
from serve_app.doctor.report import Finding
from tests.cluster.manifests import render
from tests.cluster.platform_rules import SECTION
from tests.doctor.cluster_checks import command_lines
from tests.doctor.fake_cluster import (
    MONITORING,
    FakeApi,
    Object,
    service,
)
from tests.doctor.fake_gateways import GATEWAYS, condition, gateway_class, incremental
from tests.doctor.test_cluster import ROOT
from tests.pages import KUBERNETES, section

CLASSES = "gatewayclasses.gateway.networking.k8s.io"
ACCEPTED = condition("Accepted", "True", "Accepted")


def _look(
    kubeconfig: Path, overlay: list[Object] | None, namespace: str | None = None
) -> dict[str, Finding]:
    with Cluster(namespace, kubeconfig) as cluster:
        return {finding.check: finding for finding in look(cluster, False, overlay)}


@pytest.fixture
def production() -> list[Object]:
    return render(ROOT / "cluster" / "overlays" / "production").documents


def test_missing_kinds_of_production_are_named_with_their_installation(
    api: FakeApi, kubeconfig: Path, production: list[Object]
) -> None:
    findings = _look(kubeconfig, production, "diffusion-serve")
    upgrade = findings["kinds of components/incremental-upgrade"]
    assert upgrade.outcome == "failed"
    for what in (
        "Gateway (gateway.networking.k8s.io/v1)",
        "HTTPRoute (gateway.networking.k8s.io/v1)",
        "ClientTrafficPolicy (gateway.envoyproxy.io/v1alpha1)",
        "Gateway diffusion-serve-gateway (by KubeRay)",
        "BackendTrafficPolicy diffusion-serve",
    ):
        assert what in upgrade.found
    assert INSTALL_GATEWAY in upgrade.advice
    monitoring = findings["kinds of components/monitoring"]
    assert monitoring.found == (
        "the API server does not serve PodMonitor (monitoring.coreos.com/v1), PrometheusRule "
        "(monitoring.coreos.com/v1); needed for PodMonitor diffusion-serve, PodMonitor ray, "
        "PrometheusRule diffusion-serve"
    )
    assert INSTALL_MONITORING in monitoring.advice
    assert "kinds" not in findings


def test_a_cluster_that_has_the_platform_passes(
    api: FakeApi, kubeconfig: Path, production: list[Object]
) -> None:
    api.kinds |= GATEWAYS | MONITORING
    api.put(CLASSES, gateway_class("eg-internal", ACCEPTED))
    findings = _look(kubeconfig, production, "diffusion-serve")
    assert findings["kinds"].outcome == "ok"
    assert findings["GatewayClass eg-internal"].outcome == "ok"


def test_another_version_of_a_kind_does_not_do(api: FakeApi, kubeconfig: Path) -> None:
    beta = {"apiVersion": "example.com/v1beta1", "kind": "Thing", "metadata": {"name": "x"}}
    api.kinds["example.com/v1"] = ("Thing",)
    finding = _look(kubeconfig, [service(), beta])["kinds"]
    assert finding.outcome == "failed"
    assert "Thing (example.com/v1beta1); needed for Thing x" in finding.found


def test_an_overlay_may_bring_a_kind_itself(api: FakeApi, kubeconfig: Path) -> None:
    api.kinds["apiextensions.k8s.io/v1"] = ("CustomResourceDefinition",)
    spec = {"group": "example.com", "names": {"kind": "Thing"}, "versions": [{"name": "v1"}]}
    thing = {"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": "x"}}
    definition = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "things.example.com"},
        "spec": spec,
    }
    assert _look(kubeconfig, [service(), definition, thing])["kinds"].outcome == "ok"


def test_an_ingress_needs_the_gateway_api_too(api: FakeApi, kubeconfig: Path) -> None:
    ingress = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": {"name": "way-in"},
        "spec": {"gatewayClassName": "eg"},
    }
    finding = _look(kubeconfig, [service(), ingress])["kinds of components/ingress"]
    assert finding.outcome == "failed"
    assert "neither status nor events" not in finding.advice  # KubeRay makes none here
    api.kinds |= GATEWAYS
    api.put(CLASSES, gateway_class("nginx"))
    finding = _look(kubeconfig, [service(), ingress])["GatewayClass eg"]
    assert finding.found == "Gateway way-in names it, and it does not exist (existing: nginx)"


def test_a_rejected_discovery_is_a_failure(
    api: FakeApi, kubeconfig: Path, production: list[Object]
) -> None:
    api.refusals = {"/apis/monitoring.coreos.com/v1": 500}
    assert _look(kubeconfig, production, "diffusion-serve")["kinds"].outcome == "failed"


@pytest.mark.parametrize(
    ("classes", "found", "advice"),
    [
        ([], "RayService sdxl names it, and it does not exist", "gatewayclass.yaml"),
        (
            [
                gateway_class(
                    "eg-internal", condition("Accepted", "False", "InvalidParameters", "x")
                )
            ],
            "not accepted by gateway.envoyproxy.io/gatewayclass-controller: InvalidParameters: x",
            "helm install envoy-gateway",
        ),
        ([gateway_class("eg-internal")], "no controller has handled it", "envoy-gateway"),
    ],
)
def test_the_class_must_be_accepted(
    api: FakeApi, kubeconfig: Path, classes: list[Object], found: str, advice: str
) -> None:
    api.kinds |= GATEWAYS
    api.put(CLASSES, *classes)
    finding = _look(kubeconfig, [incremental(service())])["GatewayClass eg-internal"]
    assert finding.outcome == "failed"
    assert found in finding.found
    assert advice in finding.advice


def test_forbidden_classes_are_a_warning(api: FakeApi, kubeconfig: Path) -> None:
    api.kinds |= GATEWAYS
    api.refusals = {CLASSES: 403}
    finding = _look(kubeconfig, [incremental(service())])["GatewayClass"]
    assert finding.outcome == "warning"
    assert "kubectl get gatewayclass eg-internal" in finding.advice


def test_the_platforms_page_has_the_same_commands() -> None:
    page = command_lines(section(ROOT, KUBERNETES, SECTION))
    for commands in (INSTALL_GATEWAY, INSTALL_MONITORING):
        assert len(command_lines(commands)) == 2
        assert set(command_lines(commands)) <= set(page)
