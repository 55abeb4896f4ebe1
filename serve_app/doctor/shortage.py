"""Explains a pod that no node takes: the cause at the nearest node, and the remedy.

Pure; for pending pods (`unscheduled`) and for those of an overlay (`places`).
"""

from collections.abc import Sequence
from decimal import Decimal

from serve_app.doctor import placement
from serve_app.doctor.fit import Fit, Occupancy, nearest
from serve_app.doctor.kube import Object
from serve_app.doctor.report import gib

_SHOWN = 3
"""Names that are listed; the others are counted."""

_UNKNOWN_PRODUCT = "unknown product"


def product(node: Object) -> str:
    """Return the GPU's name as GPU feature discovery labels it."""
    labels = node["metadata"].get("labels") or {}
    return str(labels.get("nvidia.com/gpu.product", _UNKNOWN_PRODUCT))


def has_product(node: Object) -> bool:
    return product(node) != _UNKNOWN_PRODUCT


def names(all_names: Sequence[str]) -> str:
    """Return the first names, and the count of the others."""
    more = len(all_names) - _SHOWN
    return ", ".join(all_names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def explain(
    spec: Object,
    nodes: Sequence[Object],
    fits: Sequence[Fit],
    occupancy: Occupancy | None,
    namespace: str,
) -> tuple[str, list[str]]:
    """Return the cause at the nearest nodes, and the advice in order of steps.

    ``fits``: the comparison with ``nodes``, none of which takes the pod; ``namespace``: the pod's.
    """
    near = nearest(fits)
    if not near:
        return "there are no nodes", ["Add one."]
    first = near[0]
    if first.takes_when_free:
        found = f"{_fit(near)}, {_short(near, occupancy, namespace)}"
        return found, [advice_on_short([resource for resource, _ in first.short])]
    if first.condition and not first.for_good:
        return f"{_fit(near)}, but {_is(near)} {' and '.join(first.condition)}", [
            _advice_on_condition(first)
        ]
    reasons: list[str] = []
    advice: list[str] = []
    where = names([fit.node for fit in near])
    if first.labels:
        wanted = " and ".join(first.labels)
        if all(set(first.labels) <= set(fit.labels) for fit in fits):
            reasons.append(f"no node has {wanted}")
        else:
            reasons.append(f"{where}: without {wanted}")
        advice.append(_advice_on_labels(first.labels, nodes))
    if first.taints:
        shown = ", ".join(_taint(*taint) for taint in first.taints)
        reasons.append(f"it does not tolerate {shown} ({where})")
        if first.for_good == 1:
            advice.append(_advice_on_taints(first))
    if first.absent:
        everywhere = all(set(first.absent) <= set(fit.absent) for fit in fits)
        what = " and no ".join(first.absent)
        reasons.append(f"no node offers {what}" if everywhere else f"{where}: no {what}")
        advice.append("GPUs that no node offers come with a GPU node and the device plugin.")
    if first.small:
        wanted_of = placement.requests(spec)
        [node] = [one for one in nodes if one["metadata"]["name"] == first.node]
        has = placement.allocatable(node)
        sizes = ", ".join(
            f"{name} {_amount(name, wanted_of[name])} (it has {_amount(name, has[name])})"
            for name in first.small
        )
        reasons.append(f"its pods request more than {first.node} has: {sizes}")
        # A node with other labels is of another kind: its size does not matter.
        if not first.labels:
            advice.append(
                "Lower requests and limits to what a node's allocatable leaves, or take larger "
                "nodes."
            )
    if first.condition:
        reasons.append(f"{where} {_is(near)} {' and '.join(first.condition)}")
    if first.short:
        reasons.append(_short(near, occupancy, namespace))
    return "; ".join(reasons), advice


def advice_on_upgrade(service: Object, resources: Sequence[str]) -> str:
    """Advise on the room that a second cluster needs beside the first."""
    name = service["metadata"]["name"]
    what = "GPUs" if any(one.startswith("nvidia.com/") for one in resources) else "room"
    return (
        f"The second cluster of an upgrade needs spare {what} until it has taken over, and "
        f"{name} is served by the first one meanwhile. Add nodes until then, or raise the node "
        "group's limit. Or scale down first, by a lower minReplicas and maxReplicas. Or use "
        "components/incremental-upgrade with a small maxSurgePercent, which still starts "
        "minReplicas workers."
    )


def _fit(near: Sequence[Fit]) -> str:
    nodes = f"{len(near)} node{'s' * (len(near) > 1)}"
    return f"{nodes} fit{'s' * (len(near) == 1)} ({names([fit.node for fit in near])})"


def _is(near: Sequence[Fit]) -> str:
    return "are" if len(near) > 1 else "is"


def _short(near: Sequence[Fit], occupancy: Occupancy | None, namespace: str) -> str:
    parts = []
    for resource, _ in near[0].short:
        missing = [dict(fit.short)[resource] for fit in near]
        least, most = _amount(resource, min(missing)), _amount(resource, max(missing))
        amount = least if least == most else f"{least} to {most}"
        verb = "lacks" if len(near) == 1 else "each lacks"
        part = f"{verb} {amount} {resource}"
        if occupancy is not None:
            holders = [one for fit in near for one in occupancy.of(fit.node, resource)]
            shown = [
                one.name if one.namespace == namespace else f"{one.namespace}/{one.name}"
                for one in holders
            ]
            part += f": taken by pod{'s' * (len(shown) > 1)} {names(shown)}"
        parts.append(part)
    return "; ".join(parts)


def _amount(resource: str, amount: Decimal) -> str:
    if resource in ("memory", "ephemeral-storage"):
        return gib(float(amount))
    return f"{amount.normalize():f}"


def advice_on_short(resources: Sequence[str]) -> str:
    """Advise where nodes fit and other pods use ``resources``."""
    autoscaler = (
        "Wait for the cluster's autoscaler (`kubectl describe pod` shows TriggeredScaleUp, or "
        "NotTriggerScaleUp and why), add a node, raise the node group's limit or the quota, or "
    )
    if any(resource.startswith("nvidia.com/") for resource in resources):
        return f"All GPUs of the nodes that fit are taken. {autoscaler}lower maxReplicas."
    if resources == ["pods"]:
        return f"The nodes that fit are full of pods. {autoscaler}raise their limit of pods."
    return (
        f"The nodes that fit have too little {' and '.join(resources)} left beside what runs "
        f"there. {autoscaler}lower the requests to what is left."
    )


def _advice_on_condition(fit: Fit) -> str:
    if fit.condition == ("cordoned",):
        return (
            "The node is cordoned, by a person or by an upgrade. When that is finished:\n"
            f"  kubectl uncordon {fit.node}"
        )
    return (
        "Kubernetes keeps pods off until the node is healthy or replaced. See its conditions "
        f"and events:\n  kubectl describe node {fit.node}"
    )


def _taint(key: str, value: str, effect: str) -> str:
    return f"{key}{f'={value}' if value else ''}:{effect}"


def _advice_on_taints(fit: Fit) -> str:
    lines = [
        f"  - {{key: {key}, operator: Exists, effect: {effect}}}"
        for key, _, effect in sorted(fit.taints)
    ]
    return "Add to the pod template:\n  tolerations:\n" + "\n".join(lines)


def _advice_on_labels(labels: Sequence[str], nodes: Sequence[Object]) -> str:
    products = sorted({product(node) for node in nodes if has_product(node)})
    if any(label.startswith("nvidia.com/") for label in labels) and not products:
        return (
            "No node has labels of GPU feature discovery: switch it on with the device plugin's "
            "value gfd.enabled=true, or add a GPU node."
        )
    if any(label.startswith("nvidia.com/gpu.product") for label in labels):
        return (
            f"Nodes here have {', '.join(products)}: use the component for that GPU, or add nodes "
            "of the other kind."
        )
    return "Add a node with these labels, or change nodeSelector or affinity of the pod template."
