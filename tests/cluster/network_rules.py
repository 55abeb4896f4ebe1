"""Rules about ports, network policies and the entrance."""

from collections.abc import Iterator
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from tests.cluster.application import application
from tests.cluster.manifests import Document, Manifests, Pod
from tests.cluster.parts import PORTS

HEADERS = {"x-request-timeout-seconds", "x-request-disconnect-disabled"}
"""Headers by which clients would control Serve's proxies."""


def ports_have_one_name(manifests: Manifests) -> Iterator[str]:
    names = {number: name for name, number in PORTS.items()}

    def wrong(name: str | None, number: int, where: str, of: Pod | Document) -> Iterator[str]:
        if number not in names or (name is not None and PORTS.get(name) != number):
            yield (
                f"{where}: port {name or ''} {number} is not one of "
                f"{', '.join(f'{n} {p}' for n, p in PORTS.items())} "
                f"({manifests.written_in(of, str(number))})"
            )

    for pod in manifests.pods:
        for container in pod.containers:
            for port in container.get("ports", []):
                where = f"{pod.where}.containers[{container['name']}].ports"
                yield from wrong(port.get("name"), port["containerPort"], where, pod)
        if pod.group is not None:
            ports = pod.spec["containers"][0].get("ports", [])
            if {"name": "serve", "containerPort": PORTS["serve"]} not in ports:
                yield (
                    f"{pod.where}.containers[0].ports: no port serve, {PORTS['serve']} "
                    f"({manifests.written_in(pod, 'workerGroupSpecs', 'containerPort')})"
                )
    for document in manifests.documents:
        name = f"{document['kind']}/{document['metadata']['name']}"
        spec = document.get("spec", {})
        match document["kind"]:
            case "Service":
                for port in spec["ports"]:
                    yield from wrong(port["name"], port["port"], f"{name}: spec.ports", document)
            case "NetworkPolicy":
                for way in ("ingress", "egress"):
                    for rule in spec.get(way, []):
                        for port in rule.get("ports", []):
                            yield from wrong(None, port["port"], f"{name}: spec.{way}", document)
            case "HTTPRoute":
                for rule in spec["rules"]:
                    for backend in rule.get("backendRefs", []):
                        yield from wrong("serve", backend["port"], f"{name}: spec.rules", document)
            case "PodMonitor" | "ServiceMonitor":
                kind = document["kind"]
                field = "podMetricsEndpoints" if kind == "PodMonitor" else "endpoints"
                if field not in spec:
                    file = manifests.written_in(document, kind)
                    yield f"{name}: spec.{field} is missing ({file})"
                for endpoint in spec.get(field, []):
                    if endpoint["port"] not in PORTS:
                        yield (
                            f"{name}: port {endpoint['port']} is not one of {', '.join(PORTS)} "
                            f"({manifests.written_in(document, document['kind'])})"
                        )
                    for address in _addresses(endpoint):
                        number = int(address.rpartition(":")[2])
                        yield from wrong("serve", number, f"{name}: relabelings", document)


def _addresses(endpoint: dict[str, Any]) -> list[str]:
    """Return the addresses that a monitor scrapes instead of the discovered ones."""
    relabelings = endpoint.get("relabelings", [])
    return [one["replacement"] for one in relabelings if one["targetLabel"] == "__address__"]


def the_application_is_read_once(manifests: Manifests) -> Iterator[str]:
    """Require one target per cluster: each gateway answers for all, so several count twice."""
    ray = [pod for pod in manifests.pods if pod.document["kind"] == "RayService"]
    monitors = manifests.of_kind("PodMonitor")
    of_application = []
    for monitor in monitors:
        where = f"PodMonitor/{monitor['metadata']['name']}: spec"
        file = manifests.written_in(monitor, "PodMonitor")
        labels = monitor["spec"]["selector"]["matchLabels"]
        own = {k: v for k, v in labels.items() if not k.startswith("ray.io/")}  # not KubeRay's
        if not all(own.items() <= pod.labels.items() for pod in ray):
            yield f"{where}.selector: {own} are not the labels of Ray's pods ({file})"
        if any(map(_addresses, monitor["spec"].get("podMetricsEndpoints", []))):
            of_application.append(monitor)
            if labels.get("ray.io/node-type") != "head":
                yield f"{where}.selector: write ray.io/node-type: head: there is one ({file})"
    if monitors and len(of_application) != 1:
        file = manifests.written_in(monitors[0], "PodMonitor")
        yield f"PodMonitor: {len(of_application)} of them read the application's /metrics ({file})"


def neighbours_are_reached(manifests: Manifests) -> Iterator[str]:
    """Require that services, routes and policies match, and that the network allows them."""
    name = manifests.service["metadata"]["name"]
    services = {one["metadata"]["name"]: one for one in manifests.of_kind("Service")}
    redis = manifests.cluster.get("gcsFaultToleranceOptions", {}).get("redisAddress")
    if redis is not None:
        host, _, port = redis.partition(":")
        ports = [
            str(one["port"]) for one in services.get(host, {"spec": {"ports": []}})["spec"]["ports"]
        ]
        if port not in ports:
            yield (
                f"RayService/{name}: spec.rayClusterConfig.gcsFaultToleranceOptions.redisAddress "
                f"is {redis}, and no such Service is applied with it "
                f"({manifests.written_in(manifests.service, 'redisAddress')})"
            )
    for route in manifests.of_kind("HTTPRoute"):
        for rule in route["spec"]["rules"]:
            for backend in rule.get("backendRefs", []):
                if backend["name"] not in {*services, f"{name}-serve-svc"}:
                    yield (
                        f"HTTPRoute/{route['metadata']['name']}: spec.rules.backendRefs: no "
                        f"Service {backend['name']} ({manifests.written_in(route, 'backendRefs')})"
                    )
    known = {(one["kind"], one["metadata"]["name"]) for one in manifests.documents}
    for route in manifests.of_kind("HTTPRoute"):
        for rule in route["spec"]["rules"]:
            for one in rule.get("filters", []):
                reference = one.get("extensionRef")
                if reference and (reference["kind"], reference["name"]) not in known:
                    yield (
                        f"HTTPRoute/{route['metadata']['name']}: spec.rules.filters: no "
                        f"{reference['kind']} {reference['name']} "
                        f"({manifests.written_in(route, 'extensionRef')})"
                    )
    if "upgradeStrategy" in manifests.service["spec"]:  # KubeRay's
        known |= {("Gateway", f"{name}-gateway"), ("HTTPRoute", f"{name}-httproute")}
    for policy in manifests.of_kind("BackendTrafficPolicy", "ClientTrafficPolicy"):
        for target in policy["spec"]["targetRefs"]:
            if (target["kind"], target["name"]) not in known:
                file = manifests.written_in(policy, "targetRefs")
                yield (
                    f"{policy['kind']}/{policy['metadata']['name']}: spec.targetRefs: no "
                    f"{target['kind']} {target['name']} ({file})"
                )
    ray = [pod for pod in manifests.pods if pod.document["kind"] == "RayService"]
    for policy in manifests.of_kind("NetworkPolicy"):
        where = f"NetworkPolicy/{policy['metadata']['name']}: spec"
        file = manifests.written_in(policy, "NetworkPolicy")
        chosen = policy["spec"]["podSelector"].get("matchLabels", {})
        if not all(chosen.items() <= pod.labels.items() for pod in ray):
            yield f"{where}.podSelector: {chosen} are not the labels of Ray's pods ({file})"
        for namespace, ports in {
            "kuberay-operator": {PORTS["dashboard"], PORTS["serve"]},
            "monitoring": {PORTS["metrics"], PORTS["serve"]},
        }.items():
            let_in = {
                port["port"]
                for rule in policy["spec"]["ingress"]
                for source in rule["from"]
                if "namespaceSelector" in source
                and source["namespaceSelector"]
                .get("matchLabels", {})
                .get("kubernetes.io/metadata.name", namespace)
                == namespace
                for port in rule.get("ports", [])
            }
            if missing := ports - let_in:
                yield f"{where}.ingress: {namespace} does not get to {sorted(missing)} ({file})"
        let_out = {
            port["port"] for rule in policy["spec"]["egress"] for port in rule.get("ports", [])
        }
        if missing := {PORTS["https"], PORTS["dns"], PORTS["otlp"]} - let_out:
            yield f"{where}.egress: pods do not get to {sorted(missing)} ({file})"


def the_way_in_is_wide_enough(manifests: Manifests) -> Iterator[str]:
    """Require limits and header filters. Envoy's defaults: 15 s, unbounded bodies, all headers."""
    incremental = "upgradeStrategy" in manifests.service["spec"]
    routes = manifests.of_kind("HTTPRoute")
    if not routes and not incremental:
        return
    if routes and incremental:
        yield (
            "RayService/diffusion-serve: spec.upgradeStrategy: with incremental upgrades KubeRay "
            "makes Gateway and HTTPRoute itself; leave components/ingress out "
            f"({manifests.written_in(manifests.service, 'upgradeStrategy')})"
        )
    config, _ = application(manifests)
    limits = config.engine.limits
    longest_s = config.gateway.max_hold_s + limits.max_deadline_s
    timeouts, removed, sizes = [], set(), []
    for route in routes:
        closed = {
            match["path"]["value"]
            for rule in route["spec"]["rules"]
            if "backendRefs" not in rule
            for match in rule["matches"]
        }
        if "/metrics" not in closed:
            yield (
                f"HTTPRoute/{route['metadata']['name']}: spec.rules: /metrics is open to every API "
                f"key, and names all of them ({manifests.written_in(route, 'HTTPRoute')})"
            )
        for rule in route["spec"]["rules"]:
            if "backendRefs" not in rule:
                continue
            where = f"HTTPRoute/{route['metadata']['name']}: spec.rules.timeouts.request"
            timeouts.append((route, where, rule.get("timeouts", {}).get("request", "15s")))
            for one in rule.get("filters", []):
                removed |= set(one.get("requestHeaderModifier", {}).get("remove", []))
    for policy in manifests.of_kind("BackendTrafficPolicy"):
        where = f"BackendTrafficPolicy/{policy['metadata']['name']}: spec"
        if "timeout" in policy["spec"]:
            seconds = policy["spec"]["timeout"]["http"]["requestTimeout"]
            timeouts.append((policy, f"{where}.timeout.http.requestTimeout", seconds))
        limit = policy["spec"]["requestBuffer"]["limit"]
        sizes.append(limit)
        if parse_quantity(limit) < limits.max_upload_bytes:
            yield (
                f"{where}.requestBuffer.limit is {limit}, less than max_upload_bytes, "
                f"{limits.max_upload_bytes} ({manifests.written_in(policy, 'requestBuffer')})"
            )
    for policy in manifests.of_kind("ClientTrafficPolicy"):
        removed |= set(policy["spec"]["headers"]["earlyRequestHeaders"]["remove"])
    for document, where, seconds in timeouts:
        if float(seconds.removesuffix("s")) <= longest_s:
            yield (
                f"{where} is {seconds}, not over max_hold_s and max_deadline_s, {longest_s:g} "
                f"({manifests.written_in(document, seconds)})"
            )
    way_in = manifests.of_kind("Gateway", "ClientTrafficPolicy")
    for name in sorted(HEADERS - removed):
        file = manifests.written_in(way_in[0], "kind") if way_in else "components/ingress"
        yield f"the way in: the header {name} must be removed ({file})"
    if not timeouts or not sizes:
        yield "the way in: no timeout or no requestBuffer.limit (cluster/components/ingress)"
