"""The scheduler's filters for pods and nodes, as far as GPUs need them.

Pure: reads pod templates and nodes as the API returns them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from serve_app.doctor.kube import Object, amount_of


@dataclass(frozen=True)
class Group:
    """Pods of one template."""

    name: str
    """Name of the service and of the group, as `sdxl gpu`."""
    pod: Object
    may_be_empty: bool
    """True if it starts without pods, so that nodes for it may come later."""


def groups(service: Object) -> list[Group]:
    """Return the head and the worker groups of a RayService."""
    spec = service["spec"].get("rayClusterConfig") or {}
    prefix = service["metadata"]["name"]
    head = ((spec.get("headGroupSpec") or {}).get("template") or {}).get("spec") or {}
    found = [Group(f"{prefix} head", head, may_be_empty=False)]
    for worker in spec.get("workerGroupSpecs") or []:
        template = (worker.get("template") or {}).get("spec") or {}
        starting = worker.get("replicas") or worker.get("minReplicas") or 0
        found.append(Group(f"{prefix} {worker['groupName']}", template, starting == 0))
    return found


def unmet(pod: Object, node: Object) -> list[str]:
    """Return the parts of the pod's selector and required node affinity that the node lacks."""
    labels = node["metadata"].get("labels") or {}
    wanted = pod.get("nodeSelector") or {}
    missing = [f"{key}={value}" for key, value in wanted.items() if labels.get(key) != value]
    affinity = ((pod.get("affinity") or {}).get("nodeAffinity") or {}).get(
        "requiredDuringSchedulingIgnoredDuringExecution"
    ) or {}
    terms = affinity.get("nodeSelectorTerms") or []
    # One term is enough; all its expressions must match.
    unmet_terms: list[list[str]] = [
        [
            _shown(expression)
            for expression in term.get("matchExpressions") or []
            if not _meets(labels, expression)
        ]
        for term in terms
    ]
    nearest_term = min(unmet_terms, key=len, default=[])
    missing += nearest_term
    return missing


def _meets(labels: Mapping[str, str], expression: Mapping[str, Any]) -> bool:
    value = labels.get(expression["key"])
    values = expression.get("values") or []
    match expression["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt" | "Lt" as operator:
            try:
                number, bound = int(value or ""), int(values[0])
            except (ValueError, IndexError):
                return False
            return number > bound if operator == "Gt" else number < bound
        case _:
            return False


def _shown(expression: Mapping[str, Any]) -> str:
    values = ",".join(expression.get("values") or [])
    return f"{expression['key']} {expression['operator']} {values}".strip()


def untolerated(pod: Object, node: Object) -> list[Object]:
    """Return the taints that keep the pod off the node."""
    tolerations = pod.get("tolerations") or []
    return [
        taint
        for taint in (node.get("spec") or {}).get("taints") or []
        if taint["effect"] in ("NoSchedule", "NoExecute")
        and not any(_tolerates(toleration, taint) for toleration in tolerations)
    ]


def _tolerates(toleration: Object, taint: Object) -> bool:
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    operator = toleration.get("operator") or "Equal"
    if not toleration.get("key"):
        return bool(operator == "Exists")
    if toleration["key"] != taint["key"]:
        return False
    return bool(
        operator == "Exists" or (toleration.get("value") or "") == (taint.get("value") or "")
    )


def requests(pod: Object) -> dict[str, Decimal]:
    """Return the requests that the scheduler counts for a pod's spec, by resource.

    They are those of all containers and sidecars together, or of the largest init container with
    the sidecars before it; and the pod's overhead.
    """
    running = _sum(_requests(container) for container in pod.get("containers") or [])
    sidecars: dict[str, Decimal] = {}
    starting: dict[str, Decimal] = {}
    for container in pod.get("initContainers") or []:
        own = _requests(container)
        if container.get("restartPolicy") == "Always":
            sidecars = _sum((sidecars, own))
            own = {}
        for resource, amount in _sum((sidecars, own)).items():
            starting[resource] = max(starting.get(resource, Decimal(0)), amount)
    most = _sum((running, sidecars))
    for resource, amount in starting.items():
        most[resource] = max(most.get(resource, Decimal(0)), amount)
    overhead = {name: amount_of(amount) for name, amount in (pod.get("overhead") or {}).items()}
    return _sum((most, overhead))


def _sum(parts: Iterable[Mapping[str, Decimal]]) -> dict[str, Decimal]:
    total: dict[str, Decimal] = {}
    for part in parts:
        for resource, amount in part.items():
            total[resource] = total.get(resource, Decimal(0)) + amount
    return total


def _requests(container: Object) -> dict[str, Decimal]:
    resources = container.get("resources") or {}
    # A limit without a request counts as a request.
    both = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
    return {name: amount_of(amount) for name, amount in both.items()}


def allocatable(node: Object) -> dict[str, Decimal]:
    """Return the resources that the node offers to pods."""
    offered = (node.get("status") or {}).get("allocatable") or {}
    return {name: amount_of(amount) for name, amount in offered.items()}


def gpus(node: Object) -> dict[str, int]:
    """Return the GPUs and MIG parts that the node offers to pods: ``{"nvidia.com/gpu": 8}``."""
    return {
        name: int(amount)
        for name, amount in allocatable(node).items()
        if (name == "nvidia.com/gpu" or name.startswith("nvidia.com/mig-")) and amount > 0
    }
