"""Which nodes take a pod: the scheduler's own filters, as far as GPUs need them.

Pure: reads pod templates and nodes as the API has them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from serve_app.doctor.kube import Object, amount_of


@dataclass(frozen=True)
class Group:
    """Pods of one template."""

    name: str
    """As `sdxl gpu`: of the service, then of the group."""
    pod: Object
    may_be_empty: bool
    """Whether it starts with no pod, so that nodes for it may come later."""


def groups(service: Object) -> list[Group]:
    """The head and the worker groups of a RayService."""
    spec = service["spec"].get("rayClusterConfig") or {}
    prefix = service["metadata"]["name"]
    head = ((spec.get("headGroupSpec") or {}).get("template") or {}).get("spec") or {}
    found = [Group(f"{prefix} head", head, may_be_empty=False)]
    for worker in spec.get("workerGroupSpecs") or []:
        template = (worker.get("template") or {}).get("spec") or {}
        starting = worker.get("replicas") or worker.get("minReplicas") or 0
        found.append(Group(f"{prefix} {worker['groupName']}", template, starting == 0))
    return found


@dataclass(frozen=True)
class Miss:
    """Why a node does not take a pod."""

    labels: tuple[str, ...]
    """That the pod selects on."""
    taints: tuple[Object, ...]
    """That it does not tolerate."""
    resources: tuple[str, ...]
    """Of which it asks for more than the node can ever give."""


TAKEN = Miss((), (), ())
"""By a node that takes the pod, once it is empty."""


def misses(pod: Object, nodes: Iterable[Object]) -> list[Miss]:
    """Of each node; ``pod`` is a pod's spec."""
    wanted = requests(pod)
    return [
        Miss(tuple(unmet(pod, node)), tuple(untolerated(pod, node)), tuple(lacking(wanted, node)))
        for node in nodes
    ]


def nearest(misses: Sequence[Miss]) -> list[Miss]:
    """Those with the fewest reasons.

    With one reason each: first those that a toleration would let in, then those of another label,
    and last those that are too small, as all nodes without a GPU are.
    """

    def distance(miss: Miss) -> tuple[int, bool, bool]:
        reasons = bool(miss.labels) + bool(miss.taints) + bool(miss.resources)
        return reasons, bool(miss.resources), bool(miss.labels)

    least = min(map(distance, misses), default=None)
    return [miss for miss in misses if distance(miss) == least]


def unmet(pod: Object, node: Object) -> list[str]:
    """What of the pod's selector and its required node affinity the node does not meet."""
    labels = node["metadata"].get("labels") or {}
    wanted = pod.get("nodeSelector") or {}
    missing = [f"{key}={value}" for key, value in wanted.items() if labels.get(key) != value]
    affinity = ((pod.get("affinity") or {}).get("nodeAffinity") or {}).get(
        "requiredDuringSchedulingIgnoredDuringExecution"
    ) or {}
    terms = affinity.get("nodeSelectorTerms") or []
    # One term is enough, and in it all must be met.
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
    """Taints that keep the pod off the node."""
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
    """What the scheduler counts: all containers, or the largest init container."""
    most: dict[str, Decimal] = {}
    for container in pod.get("containers") or []:
        for resource, amount in _requests(container).items():
            most[resource] = most.get(resource, Decimal(0)) + amount
    for container in pod.get("initContainers") or []:
        for resource, amount in _requests(container).items():
            most[resource] = max(most.get(resource, Decimal(0)), amount)
    return most


def _requests(container: Object) -> dict[str, Decimal]:
    resources = container.get("resources") or {}
    # A limit without a request is one, too.
    both = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
    return {name: amount_of(amount) for name, amount in both.items()}


def lacking(wanted: Mapping[str, Decimal], node: Object) -> list[str]:
    """Resources of which the node can never give as much."""
    offered = allocatable(node)
    return [name for name, amount in wanted.items() if amount > offered.get(name, Decimal(0))]


def allocatable(node: Object) -> dict[str, Decimal]:
    """What pods can have of the node."""
    offered = (node.get("status") or {}).get("allocatable") or {}
    return {name: amount_of(amount) for name, amount in offered.items()}


def gpus(node: Object) -> dict[str, int]:
    """GPUs that pods can have of the node, and parts of them: ``{"nvidia.com/gpu": 8}``."""
    return {
        name: int(amount)
        for name, amount in allocatable(node).items()
        if (name == "nvidia.com/gpu" or name.startswith("nvidia.com/mig-")) and amount > 0
    }
