"""Gateways and their classes, for the fake API server: `FakeApi.kinds`, `FakeApi.put`."""

from tests.doctor.fake_cluster import Object

GATEWAYS = {
    "gateway.networking.k8s.io/v1": ("Gateway", "GatewayClass", "HTTPRoute"),
    "gateway.envoyproxy.io/v1alpha1": (
        "BackendTrafficPolicy",
        "ClientTrafficPolicy",
        "EnvoyProxy",
        "HTTPRouteFilter",
    ),
}


def condition(type_: str, status: str, reason: str, message: str = "") -> Object:
    return {"type": type_, "status": status, "reason": reason, "message": message}


def gateway(name: str, *conditions: Object, address: str | None = None) -> Object:
    addresses = [{"type": "IPAddress", "value": address}] if address else []
    return {
        "kind": "Gateway",
        "metadata": {"name": name, "namespace": "images"},
        "spec": {"gatewayClassName": "eg-internal", "listeners": []},
        "status": {"conditions": list(conditions), "addresses": addresses},
    }


def gateway_class(name: str, *conditions: Object) -> Object:
    return {
        "kind": "GatewayClass",
        "metadata": {"name": name},
        "spec": {"controllerName": "gateway.envoyproxy.io/gatewayclass-controller"},
        "status": {"conditions": list(conditions)},
    }


def incremental(one: Object) -> Object:
    """Return the RayService with incremental upgrades."""
    options = {"gatewayClassName": "eg-internal", "stepSizePercent": 25, "intervalSeconds": 60}
    strategy = {"type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": options}
    return one | {"spec": one["spec"] | {"upgradeStrategy": strategy}}
