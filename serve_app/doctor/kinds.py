"""Compares the kinds that an overlay needs with those that the API server serves.

`kubectl apply` rejects an object of an unknown kind, and KubeRay cannot create one either: for an
incremental upgrade it creates a Gateway and an HTTPRoute itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from serve_app.doctor.kube import Cluster, Object
from serve_app.doctor.report import Finding, failed, ok

GATEWAY_API = "gateway.networking.k8s.io/v1"

INSTALL_MONITORING = (
    "  helm repo add prometheus-community https://prometheus-community.github.io/helm-charts\n"
    "  helm install kube-prometheus-stack prometheus-community/kube-prometheus-stack "
    "--version 88.4.0 \\\n"
    "      --namespace monitoring --create-namespace "
    "--values cluster/platform/kube-prometheus-stack.yaml"
)
INSTALL_GATEWAY = (
    "  helm install envoy-gateway oci://docker.io/envoyproxy/gateway-helm --version v1.9.1 \\\n"
    "      --namespace envoy-gateway-system --create-namespace\n"
    "  kubectl apply -f cluster/platform/gatewayclass.yaml"
)
"""Commands of docs/operate/kubernetes.md."""

_GATEWAY_GROUPS = ("gateway.networking.k8s.io", "gateway.envoyproxy.io")


@dataclass(frozen=True)
class _Needed:
    """An object that will be created."""

    api_version: str
    kind: str
    name: str
    by_kuberay: bool = False

    @property
    def group(self) -> str:
        return self.api_version.rpartition("/")[0]

    @property
    def shown(self) -> str:
        return f"{self.kind} {self.name}" + (" (by KubeRay)" if self.by_kuberay else "")


def is_incremental(service: Object) -> bool:
    """Return whether KubeRay creates a Gateway for the RayService."""
    strategy = service["spec"].get("upgradeStrategy") or {}
    return bool(strategy.get("type") == "NewClusterWithIncrementalUpgrade")


def gateway_name(service: Object) -> str:
    """Return KubeRay's name for the Gateway of an incremental RayService."""
    return f"{service['metadata']['name']}-gateway"


def check_kinds(
    cluster: Cluster, services: Sequence[Object], overlay: Sequence[Object] | None
) -> Iterator[Finding]:
    """Look up each kind, which needs no rights. ray.io has rows of its own."""
    needed = [
        _Needed(str(one.get("apiVersion", "")), str(one["kind"]), str(_name(one)))
        for one in overlay or ()
    ]
    incremental = [one for one in services if is_incremental(one)]
    for service in incremental:
        name = service["metadata"]["name"]
        needed += [
            _Needed(GATEWAY_API, "Gateway", gateway_name(service), by_kuberay=True),
            _Needed(GATEWAY_API, "HTTPRoute", f"{name}-httproute", by_kuberay=True),
        ]
    needed = [one for one in needed if one.api_version and one.group != "ray.io"]
    brought = _brought_kinds(overlay or ())
    missing = [
        one
        for one in needed
        if (one.api_version, one.kind) not in brought
        and one.kind not in cluster.kinds(one.api_version)
    ]
    if not missing:
        if needed:
            kinds = {(one.group, one.kind) for one in needed}
            yield ok("kinds", f"all {len(kinds)} that are needed are served")
        return
    of_gateways = [one for one in missing if one.group in _GATEWAY_GROUPS]
    of_monitoring = [one for one in missing if one.group == "monitoring.coreos.com"]
    others = [one for one in missing if one not in of_gateways and one not in of_monitoring]
    if of_gateways:
        component = "incremental-upgrade" if incremental else "ingress"
        what = (
            "Without the Gateway API, KubeRay gives an incremental RayService neither status nor "
            "events. "
            if any(one.by_kuberay for one in of_gateways)
            else ""
        )
        yield failed(
            f"kinds of components/{component}",
            _found(of_gateways),
            f"{what}Install Envoy Gateway, which brings these kinds, in a clone of this "
            f"repository:\n{INSTALL_GATEWAY}\n"
            f"Or leave components/{component} out of the overlay.",
        )
    if of_monitoring:
        yield failed(
            "kinds of components/monitoring",
            _found(of_monitoring),
            "Install the Prometheus Operator, which brings these kinds, in a clone of this "
            f"repository:\n{INSTALL_MONITORING}\n"
            "Or leave components/monitoring out of the overlay.",
        )
    if others:
        yield failed(
            "kinds",
            _found(others),
            "Install what brings these kinds, or another version of it, before the overlay is "
            "applied; or leave the objects out. `kubectl api-resources` shows what is served.",
        )


def _brought_kinds(overlay: Sequence[Object]) -> set[tuple[str, str]]:
    """Return the kinds that the overlay brings itself."""
    return {
        (f"{one['spec']['group']}/{version['name']}", one["spec"]["names"]["kind"])
        for one in overlay
        if one["kind"] == "CustomResourceDefinition"
        for version in one["spec"]["versions"]
    }


def _name(one: Object) -> str:
    return str((one.get("metadata") or {}).get("name", ""))


def _found(missing: Sequence[_Needed]) -> str:
    by_kind: dict[tuple[str, str], list[_Needed]] = {}
    for one in missing:
        by_kind.setdefault((one.api_version, one.kind), []).append(one)
    kinds = ", ".join(f"{kind} ({api_version})" for api_version, kind in by_kind)
    objects = ", ".join(dict.fromkeys(one.shown for one in missing))
    return f"the API server does not serve {kinds}; needed for {objects}"
