"""Reads a rehearsal's namespace: RayClusters, pods, conditions, events.

Every read is fresh. Time-outs belong to the steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from serve_app.doctor import pending
from serve_app.doctor.kube import NotReadable, Object, base
from serve_app.doctor.kube_write import WritableCluster
from serve_app.doctor.report import Finding

HASH = "ray.io/hash-without-replicas-and-workers-to-delete"
"""Annotation of a RayCluster: the spec that KubeRay compares to decide on an upgrade."""

Kubelet = Literal["runs", "fake", "none"]
"""Source of pod status. ``fake``: something marks pods as running, and no container runs."""

_KWOK = "kwok.x-k8s.io/node"


@dataclass(frozen=True)
class Service:
    """A RayService's status, as far as a rehearsal needs it."""

    active: str
    """Name of the RayCluster that serves; empty if none does."""
    pending: str
    """Name of the RayCluster that will serve next; empty if there is none."""
    conditions: Mapping[str, Object]
    applications: Mapping[str, str]
    """Serve applications of both, with their states."""
    routed: Mapping[str, int]
    """Percent of the requests by RayCluster, where a Gateway splits them."""
    messages: tuple[str, ...]
    """Messages of the applications that failed."""

    @property
    def newest(self) -> str:
        """Return the RayCluster of the spec that was applied last."""
        return self.pending or self.active

    @property
    def ready(self) -> bool:
        return self.conditions.get("Ready", {}).get("status") == "True"

    @property
    def refusal(self) -> str:
        """Return the operator's message if it rejects the spec; else an empty text."""
        condition = self.conditions.get("Ready", {})
        if condition.get("reason") != "ValidationFailed":
            return ""
        return str(condition.get("message") or condition["reason"])

    @property
    def serves(self) -> bool:
        """Return whether every application runs and a pod takes requests."""
        return self.ready and all(state == "RUNNING" for state in self.applications.values())

    def __str__(self) -> str:
        condition = self.conditions.get("Ready", {})
        reason, message = condition.get("reason", "no status yet"), condition.get("message", "")
        parts = [f"{reason}: {message}".rstrip(": ")]
        parts += [f"{name} {state}" for name, state in self.applications.items()]
        parts += [f"{percent} % to {name}" for name, percent in self.routed.items()]
        return "; ".join(parts)


class Observer:
    """Reads one namespace of a cluster."""

    def __init__(self, cluster: WritableCluster, namespace: str, service: Object) -> None:
        """Observe ``service``, the RayService as it is applied."""
        self._cluster = cluster
        self._namespace = namespace
        self._service = service
        self.ray = base("ray.io/v1", namespace)
        self.core = base("v1", namespace)
        self.service_path = f"{self.ray}/rayservices/{service['metadata']['name']}"

    def service(self) -> Service:
        """Read the RayService's status; empty until the operator has written one."""
        found = self._cluster.get(self.service_path) or {}
        status = found.get("status") or {}
        parts = [status.get(f"{one}ServiceStatus") or {} for one in ("active", "pending")]
        applications = {
            name: one
            for part in parts
            for name, one in (part.get("applicationStatuses") or {}).items()
        }
        return Service(
            active=parts[0].get("rayClusterName") or "",
            pending=parts[1].get("rayClusterName") or "",
            conditions={one["type"]: one for one in status.get("conditions") or ()},
            applications={name: one.get("status", "") for name, one in applications.items()},
            routed={
                part["rayClusterName"]: part["trafficRoutedPercent"]
                for part in parts
                if part.get("rayClusterName") and part.get("trafficRoutedPercent") is not None
            },
            messages=tuple(
                f"application {name} is {one['status']}: {one.get('message', '')}".rstrip(": ")
                for name, one in applications.items()
                if one.get("status") in ("DEPLOY_FAILED", "UNHEALTHY")
            ),
        )

    def ray_clusters(self) -> dict[str, Object]:
        """Read the RayClusters by name, those in deletion included."""
        return {
            one["metadata"]["name"]: one for one in self._cluster.items(f"{self.ray}/rayclusters")
        }

    def pods(self) -> list[Object]:
        return self._cluster.items(f"{self.core}/pods")

    def events(self) -> list[Object]:
        return self._cluster.items(f"{self.core}/events")

    def complaints(self) -> str:
        """Read the warnings about the RayService and its RayClusters, the latest last."""
        details = [
            f"{one.get('reason', '')}: {one.get('message', '')}"
            for one in sorted(
                self.events(),
                key=lambda one: one.get("lastTimestamp") or one.get("eventTime") or "",
            )
            if one.get("type") == "Warning"
            and one["involvedObject"].get("kind") in ("RayService", "RayCluster")
        ]
        return "; ".join(dict.fromkeys(details[-3:]))

    def config_updates(self) -> int:
        """Count the Serve configs that the operator has sent to a Ray cluster."""
        return sum(
            int(one.get("count") or (one.get("series") or {}).get("count") or 1)
            for one in self.events()
            if one.get("reason") == "UpdatedServeApplications"
        )

    def serving_pods(self, service: Service) -> list[str]:
        """List the names of the pods that receive requests.

        They belong to the serve Service; during an incremental upgrade, to the RayCluster with the
        most requests from the Gateway.
        """
        name = str(self._service["metadata"]["name"])
        if len(service.routed) > 1:
            name = max(service.routed, key=lambda one: service.routed[one])
        slices = self._cluster.items(
            f"{base('discovery.k8s.io/v1', self._namespace)}/endpointslices",
            labelSelector=f"kubernetes.io/service-name={name}-serve-svc",
        )
        return sorted(
            endpoint["targetRef"]["name"]
            for one in slices
            for endpoint in one.get("endpoints") or ()
            if (endpoint.get("conditions") or {}).get("ready") and endpoint.get("targetRef")
        )

    def gateway_trouble(self) -> str:
        """Explain why the Gateway of an incremental upgrade takes no requests; empty if it does."""
        name = f"{self._service['metadata']['name']}-gateway"
        root = base("gateway.networking.k8s.io/v1", self._namespace)
        gateway = self._cluster.get(f"{root}/gateways/{name}") or {}
        for condition in (gateway.get("status") or {}).get("conditions") or ():
            if condition["type"] == "Programmed":
                if condition["status"] == "True":
                    return ""
                return f"Gateway {name} is not programmed: {condition.get('message', '')}"
        return f"Gateway {name} is not programmed: no controller has handled it"

    def kubelet(self, pods: Sequence[Object]) -> Kubelet | None:
        """Return the kubelet that runs these bound pods; None if none has accepted them yet."""
        fake = self._fake_nodes()
        if any(pod["spec"].get("nodeName") in fake for pod in pods):
            return "fake"
        states = [
            one for pod in pods for one in (pod.get("status") or {}).get("containerStatuses") or ()
        ]
        # A container runtime gives each container an id; a kubelet reports why one waits.
        if any(one.get("containerID") or (one.get("state") or {}).get("waiting") for one in states):
            return "runs"
        return "fake" if states else None

    def _fake_nodes(self) -> set[str]:
        try:
            nodes = self._cluster.items(f"{base('v1')}/nodes")
        except NotReadable:  # no right to read them: the pods' containers decide as well
            return set()
        return {
            node["metadata"]["name"]
            for node in nodes
            if _KWOK in (node["metadata"].get("annotations") or {}) or not _runtime(node)
        }


def _runtime(node: Object) -> str:
    """Read the node's container runtime, as `containerd://2.1`; every real kubelet reports one."""
    info = (node.get("status") or {}).get("nodeInfo") or {}
    version = str(info.get("containerRuntimeVersion") or "")
    return version if "://" in version else ""


def expected(service: Object) -> dict[str, int]:
    """Count the pods that a RayCluster starts with, by group; the head's is called `head`."""
    spec = service["spec"]["rayClusterConfig"]
    return {"head": 1} | {
        group["groupName"]: max(group.get("minReplicas") or 0, group.get("replicas") or 0)
        * (group.get("numOfHosts") or 1)
        for group in spec.get("workerGroupSpecs") or ()
    }


@dataclass(frozen=True)
class Placement:
    """The pods of one RayCluster by their state of scheduling."""

    bound: tuple[Object, ...]
    missing: Mapping[str, int]
    """Pods by group that the operator has not created yet."""
    unplaced: tuple[Finding, ...]
    """Pods without a node, and the scheduler's reasons."""
    scaling_up: bool
    """True if a node autoscaler is adding nodes for them."""

    @property
    def complete(self) -> bool:
        return not self.missing and not self.unplaced

    def __str__(self) -> str:
        nodes = sorted({pod["spec"]["nodeName"] for pod in self.bound})
        parts = [f"{len(self.bound)} pods on {', '.join(nodes)}" if nodes else "no pod on a node"]
        parts += [f"{count} of group {group} not made" for group, count in self.missing.items()]
        parts += [f"{one.check} {one.found}" for one in self.unplaced]
        return "; ".join(parts)


def place(
    pods: Sequence[Object], events: Sequence[Object], ray_cluster: str, service: Object
) -> Placement:
    """Sort the pods of ``ray_cluster`` by their state of scheduling."""
    own = [
        pod
        for pod in pods
        if (pod["metadata"].get("labels") or {}).get("ray.io/cluster") == ray_cluster
        and not pod["metadata"].get("deletionTimestamp")
    ]
    made: dict[str, int] = {}
    for pod in own:
        labels = pod["metadata"]["labels"]
        group = "head" if labels.get("ray.io/node-type") == "head" else labels.get("ray.io/group")
        made[group] = made.get(group, 0) + 1
    waiting = [pod for pod in own if not pod["spec"].get("nodeName")]
    names = {pod["metadata"]["name"] for pod in waiting}
    return Placement(
        bound=tuple(pod for pod in own if pod["spec"].get("nodeName")),
        missing={
            group: count - made.get(group, 0)
            for group, count in expected(service).items()
            if made.get(group, 0) < count
        },
        unplaced=tuple(
            finding for pod in waiting if (finding := pending.why(pod, events)) is not None
        ),
        scaling_up=any(
            one.get("reason") in ("TriggeredScaleUp", "Nominated")
            and one["involvedObject"].get("name") in names
            for one in events
        ),
    )
