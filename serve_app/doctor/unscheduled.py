"""Explains why the scheduler finds no node for a pod.

It compares the pod with each node, as the scheduler does. The scheduler's own message sums up all
nodes, so that irrelevant reasons stand beside the cause. It decides only where nodes do not show
the reason: volumes, ports, other pods that the pod must or must not be beside.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.doctor import fit, shortage
from serve_app.doctor.kube import Object
from serve_app.doctor.report import Finding, failed, warning

_OF_THE_POD = (
    (
        r"persistentvolumeclaim \S+ not found",
        "Apply the claim: it comes with the component `model-cache`.",
    ),
    (
        r"unbound immediate PersistentVolumeClaims",
        "Look at the claim (`kubectl describe pvc`): its StorageClass does not exist, or can make "
        "no volume of this size and access mode.",
    ),
)
"""Messages that are about all nodes at once."""

_OF_NODES = (
    (
        r"volume node affinity conflict",
        "The volume lies in another zone than the free nodes. Use a StorageClass with the "
        "volumeBindingMode WaitForFirstConsumer, or add nodes in its zone.",
    ),
    (
        r"exceed max volume count",
        "The node has as many volumes attached as it can: add a node, or take fewer volumes.",
    ),
    (
        r"free ports for the requested pod ports",
        "Another pod has the hostPort on these nodes: take hostPort out of the pod template.",
    ),
    (
        r"pod (anti-)?affinity|topology spread constraints",
        "An affinity or spread rule keeps it off: check podAffinity, podAntiAffinity "
        "and topologySpreadConstraints of the pod template, or add nodes.",
    ),
    (
        r"Too many pods",
        "The node is full of pods: raise its limit, or take more nodes.",
    ),
)
"""Reasons of single nodes that their labels, taints and resources do not show."""

_INSUFFICIENT = re.compile(r"Insufficient ([\w./-]+\w)")


@dataclass(frozen=True)
class Surroundings:
    """The objects that pods are compared with; None for those that may not be read."""

    nodes: Sequence[Object] | None
    occupancy: fit.Occupancy | None
    services: Sequence[Object]
    """RayServices of the namespace."""


def upgrade_of(pod: Object, services: Sequence[Object]) -> Object | None:
    """Return the RayService whose second Ray cluster has this pod, beside the first."""
    cluster = (pod["metadata"].get("labels") or {}).get("ray.io/cluster")
    for service in services:
        status = service.get("status") or {}
        active = (status.get("activeServiceStatus") or {}).get("rayClusterName")
        pending = (status.get("pendingServiceStatus") or {}).get("rayClusterName")
        if cluster and active and pending == cluster:
            return service
    return None


def is_ready(service: Object) -> bool:
    """Return whether KubeRay reports the service as ready."""
    conditions = (service.get("status") or {}).get("conditions") or ()
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def why(
    check: str,
    pod: Object,
    condition: Object,
    events: Sequence[Object],
    around: Surroundings | None,
) -> Finding:
    """Explain an unscheduled pod. ``condition``: PodScheduled; ``events``: the latest last."""
    message = condition.get("message") or condition.get("reason") or "no reason given"
    if condition.get("reason") == "SchedulingGated":
        return warning(
            check,
            f"pending: {message}",
            "A controller such as Kueue holds its schedulingGates: check that controller.",
        )
    for pattern, advice in _OF_THE_POD:
        if re.search(pattern, message):
            return failed(check, f"pending: {message}", advice)
    if around is None or around.nodes is None:
        return failed(
            check,
            f"pending: {message}",
            "The nodes would show which of these reasons is the cause, and may not be read: "
            "have that granted, or compare `kubectl describe pod` with `kubectl describe node`.",
        )
    fits = fit.judge(pod["spec"], around.nodes, around.occupancy)
    if taking := [one.node for one in fits if one.takes]:
        return _although_nodes_fit(check, message, taking, around)
    found, advices = shortage.explain(
        pod["spec"], around.nodes, fits, around.occupancy, pod["metadata"].get("namespace", "")
    )
    [first, *_] = fit.nearest(fits) or [fit.Fit("none")]
    upgraded = upgrade_of(pod, around.services)
    if first.short and upgraded is not None:
        short = [resource for resource, _ in first.short]
        advices = [shortage.advice_on_upgrade(upgraded, short), *advices]
    if first.taints and first.for_good == 1:
        advices.append(_advice_on_applying(pod, around.services))
    if (scaling := _autoscaler(events)) is not None:
        found += f"; the cluster's autoscaler: {scaling}"
    return failed(check, f"pending: {found}. The scheduler: {message}", "\n".join(advices))


def _although_nodes_fit(
    check: str, message: str, taking: Sequence[str], around: Surroundings
) -> Finding:
    fitting = f"{len(taking)} node{'s' * (len(taking) > 1)} ({shortage.names(taking)})"
    for pattern, advice in _OF_NODES:
        if re.search(pattern, message):
            return failed(check, f"pending: {message}", advice)
    short = sorted(set(_INSUFFICIENT.findall(message)))
    if around.occupancy is None and short:
        return failed(
            check,
            f"pending: {fitting} would take it when empty, and pods of other namespaces, which "
            f"may have what is short, may not be read. The scheduler: {message}",
            shortage.advice_on_short(short),
        )
    return failed(
        check,
        f"pending: {message}",
        f"By labels, taints and free resources, {fitting} can take it: run the doctor again in a "
        "minute; if it stays pending, `kubectl describe pod` shows its events.",
    )


def _advice_on_applying(pod: Object, services: Sequence[Object]) -> str:
    """Advise how a changed toleration reaches pods; delete a service only if it is not ready."""
    change = (
        "KubeRay leaves tolerations out when it compares: change an annotation of the same pod "
        "template with them, so that it makes a new cluster."
    )
    name = (pod["metadata"].get("labels") or {}).get("ray.io/cluster", "")
    owners = [one for one in services if name.startswith(f"{one['metadata']['name']}-")]
    if not owners or any(is_ready(one) for one in owners):
        return change
    return f"{change} Or, since it is not ready, delete the RayService and apply it again."


def _autoscaler(events: Sequence[Object]) -> str | None:
    """Return the last message of the cluster's autoscaler on the pod."""
    for event in reversed(events):
        if event.get("reason") in ("TriggeredScaleUp", "NotTriggerScaleUp"):
            return f"{event['reason']}: {event.get('message', '')}".rstrip(": ")
    return None
