"""Checks of the Gateway API's Gateways: whether traffic can enter.

A RayService is Ready once its replicas answer, even if its Gateway has no address. Then no client
reaches it, and a later incremental upgrade stands still at 0 %.
"""

from collections.abc import Iterator, Sequence

from serve_app.doctor.kinds import GATEWAY_API, INSTALL_GATEWAY, gateway_name, is_incremental
from serve_app.doctor.kube import Cluster, NotReadable, Object, Unreachable, images
from serve_app.doctor.report import Finding, failed, ok, warning

_GATEWAYS = "gateways.gateway.networking.k8s.io"
_CLASSES = "gatewayclasses.gateway.networking.k8s.io"
_CONTROLLER = "gateway.envoyproxy.io/gatewayclass-controller"
_APPLY_CLASSES = "  kubectl apply -f cluster/platform/gatewayclass.yaml"


def check_classes(
    cluster: Cluster, services: Sequence[Object], overlay: Sequence[Object] | None
) -> Iterator[Finding]:
    """Check that each named GatewayClass exists and is accepted by its controller."""
    wanted = {
        (options.get("gatewayClassName") or "", f"RayService {one['metadata']['name']}")
        for one in services
        if is_incremental(one)
        for options in [one["spec"]["upgradeStrategy"].get("clusterUpgradeOptions") or {}]
    }
    wanted |= {
        ((one.get("spec") or {}).get("gatewayClassName") or "", f"Gateway {_name(one)}")
        for one in overlay or ()
        if one["kind"] == "Gateway"
    }
    wanted = {(name, by) for name, by in wanted if name}
    if not wanted or not cluster.kinds(GATEWAY_API):
        return
    try:
        here = {_name(one): one for one in cluster.list(_CLASSES)}
    except Unreachable:
        raise
    except NotReadable as error:
        names = " ".join(sorted({name for name, _ in wanted}))
        yield warning(
            "GatewayClass",
            error.found,
            f"Make sure that it is accepted: `kubectl get gatewayclass {names}`.\n{error.advice}",
        )
        return
    coming = {_name(one) for one in overlay or () if one["kind"] == "GatewayClass"}
    for name in sorted({name for name, _ in wanted}):
        check = f"GatewayClass {name}"
        by = ", ".join(sorted(by for one, by in wanted if one == name))
        if name not in here and name in coming:
            continue
        if name not in here:
            others = f" (existing: {', '.join(sorted(here))})" if here else ""
            yield failed(
                check,
                f"{by} names it, and it does not exist{others}",
                "Create the GatewayClasses of this repository, or name an existing "
                f"one:\n{_APPLY_CLASSES}",
            )
            continue
        accepted = _conditions(here[name]).get("Accepted", {})
        if accepted.get("status") == "True":
            yield ok(check, "accepted")
            continue
        yield failed(
            check,
            f"not accepted by {here[name]['spec']['controllerName']}: {_said(accepted)}",
            _advice_on_controller(cluster, here[name]["spec"]["controllerName"]),
        )


def check_gateways(cluster: Cluster) -> Iterator[Finding]:
    """Check that each Gateway of the namespace is programmed, KubeRay's own included."""
    if not cluster.kinds(GATEWAY_API):
        return
    services = cluster.list("rayservices.ray.io", everywhere=False)
    gateways = cluster.list(_GATEWAYS, everywhere=False)
    names = {_name(one) for one in gateways}
    for service in services:
        # No controller has handled one without a status; a row of its own reports it.
        if is_incremental(service) and service.get("status"):
            name = gateway_name(service)
            if name not in names:
                yield failed(
                    f"Gateway {name}",
                    f"KubeRay has not created it for RayService {_name(service)}",
                    "It makes one only with its feature gate RayServiceIncrementalUpgrade, which "
                    "cluster/platform/kuberay-operator.yaml sets; the operator's log has details.",
                )
    for gateway in gateways:
        yield _check_gateway(cluster, gateway)


def _check_gateway(cluster: Cluster, gateway: Object) -> Finding:
    check = f"Gateway {_name(gateway)}"
    conditions = _conditions(gateway)
    accepted, programmed = conditions.get("Accepted", {}), conditions.get("Programmed", {})
    if programmed.get("status") == "True":
        addresses = (gateway.get("status") or {}).get("addresses") or ()
        return ok(check, "programmed, " + (", ".join(one["value"] for one in addresses) or "ready"))
    if accepted.get("status") == "False":
        return failed(
            check,
            f"not accepted: {_said(accepted)}",
            f"Correct its cause: `kubectl describe gateway {_name(gateway)}` shows which listener "
            "or parameter it is, and its GatewayClass must be accepted.",
        )
    found = f"not programmed: {_said(programmed)}"
    if programmed.get("reason") == "AddressNotAssigned":
        return failed(
            check,
            found,
            "Its Service of type LoadBalancer has no address: `kubectl get services "
            "--all-namespaces --selector gateway.envoyproxy.io/owning-gateway-name="
            f"{_name(gateway)}` and its events show why (no load balancers in this cluster, a "
            "quota). If clients are inside the cluster only, use the class eg-internal.",
        )
    if programmed.get("reason") == "NoResources":
        return failed(
            check,
            found,
            "The pods of its proxy do not run: `kubectl get pods --all-namespaces --selector "
            f"gateway.envoyproxy.io/owning-gateway-name={_name(gateway)}`.",
        )
    try:
        classes = {_name(one): one for one in cluster.list(_CLASSES)}
    except Unreachable:
        raise
    except NotReadable:
        classes = {}
    own = classes.get(gateway["spec"]["gatewayClassName"])
    return failed(
        check, found, _advice_on_controller(cluster, own["spec"]["controllerName"] if own else None)
    )


def _advice_on_controller(cluster: Cluster, controller: str | None) -> str:
    """Advise on a controller that has not acted: it may be missing."""
    if controller not in (None, _CONTROLLER):
        return f"Check that {controller} runs, and its log: no other controller handles the class."
    try:
        running = [
            one
            for one in cluster.list("deployments.apps")
            if any("envoyproxy/gateway:" in image for image in images(one))
        ]
    except Unreachable:
        raise
    except NotReadable:
        running = None
    if running == []:
        return (
            "Envoy Gateway, which answers for it, is not there; install it, in a clone of this "
            f"repository:\n{INSTALL_GATEWAY}"
        )
    if running and not any((one.get("status") or {}).get("availableReplicas") for one in running):
        where = running[0]["metadata"]["namespace"]
        return (
            "Envoy Gateway, which answers for it, is not available:\n"
            f"  kubectl -n {where} get pods\n"
            f"  kubectl -n {where} describe deployment {_name(running[0])}"
        )
    return (
        "Check whether Envoy Gateway runs, whether the GatewayClass is accepted, and whether the "
        "Service of its proxy has an address:\n"
        "  kubectl -n envoy-gateway-system get deployments,pods,services\n"
        "  kubectl get gatewayclasses"
    )


def _conditions(one: Object) -> dict[str, Object]:
    return {
        condition["type"]: condition
        for condition in (one.get("status") or {}).get("conditions") or ()
    }


def _said(condition: Object) -> str:
    details = ": ".join(condition[key] for key in ("reason", "message") if condition.get(key))
    return details or "no controller has handled it"


def _name(one: Object) -> str:
    return str((one.get("metadata") or {}).get("name", ""))
