"""Compares a pod with each node: whether it fits now, and the reasons against it.

Pure: reads pod specs, nodes and pods as the API returns them. The same comparison serves pending
pods and those of an overlay.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from serve_app.doctor import placement
from serve_app.doctor.kube import Object

_CONDITION = re.compile(
    r"node\.(cloudprovider\.)?kubernetes\.io/|ToBeDeletedByClusterAutoscaler$|karpenter\.sh/disrupt"
)
"""Taints for the state of a node, not for its users: no pod template should tolerate them."""

_CONTROL_PLANE = re.compile(r"node-role\.kubernetes\.io/(control-plane|master)$")

_NAMED = {
    "node.kubernetes.io/unschedulable": "cordoned",
    "node.kubernetes.io/not-ready": "not ready",
    "node.kubernetes.io/unreachable": "not ready",
}

_PODS = "pods"
"""Resource in a node's allocatable of which each pod takes one."""


@dataclass(frozen=True)
class Holder:
    """A pod that runs on a node, with its requests."""

    name: str
    namespace: str
    requests: dict[str, Decimal]


class Occupancy:
    """The resources that pods of all namespaces use on each node."""

    def __init__(self, pods: Iterable[Object]) -> None:
        self._of_node: dict[str, list[Holder]] = {}
        for pod in pods:
            node = (pod.get("spec") or {}).get("nodeName")
            if node and (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed"):
                requests = placement.requests(pod["spec"]) | {_PODS: Decimal(1)}
                meta = pod["metadata"]
                self._of_node.setdefault(node, []).append(
                    Holder(meta["name"], meta.get("namespace", ""), requests)
                )

    def of(self, node: str, resource: str) -> list[Holder]:
        """Return the pods that use ``resource`` on ``node``, the largest first."""
        holders = [one for one in self._of_node.get(node, ()) if one.requests.get(resource)]
        return sorted(holders, key=lambda one: (-one.requests[resource], one.name))

    def taken(self, node: str, resource: str) -> Decimal:
        return sum((one.requests[resource] for one in self.of(node, resource)), Decimal(0))


@dataclass(frozen=True)
class Fit:
    """The reasons that keep a pod off a node; the pod fits where all are empty."""

    node: str
    labels: tuple[str, ...] = ()
    """Required labels that the node lacks."""
    taints: tuple[tuple[str, str, str], ...] = ()
    """Taints that are not tolerated: key, value and effect of each."""
    condition: tuple[str, ...] = ()
    """Reason why the node takes no new pods at the moment, as `cordoned`."""
    absent: tuple[str, ...] = ()
    """Resources of which the node has none at all."""
    small: tuple[str, ...] = ()
    """Resources of which the node has less than requested, even when it is empty."""
    short: tuple[tuple[str, Decimal], ...] = ()
    """Resources that other pods use, with the missing amount of each."""

    @property
    def takes(self) -> bool:
        """True if the pod fits there now."""
        return self.takes_when_free and not self.short

    @property
    def takes_when_free(self) -> bool:
        """True if the pod fits there once other pods make room."""
        return not (self.labels or self.taints or self.condition or self.absent or self.small)

    @property
    def for_good(self) -> int:
        """Number of kinds of reasons that do not pass by themselves."""
        return sum(map(bool, (self.labels, self.taints, self.absent, self.small)))

    @property
    def _cost(self) -> int:
        # The most expensive remedy decides: wait, uncordon, tolerate, request
        # less, have another kind of node, have a GPU at all. A control plane is never a choice.
        reserved = any(_CONTROL_PLANE.match(key) for key, _, _ in self.taints)
        reasons = (
            self.short,
            self.condition,
            self.taints,
            self.small,
            self.labels,
            self.absent,
            reserved,
        )
        return sum(2**dearness for dearness, reason in enumerate(reasons) if reason)

    @property
    def _reasons(self) -> tuple[object, ...]:
        short = tuple(resource for resource, _ in self.short)
        return self.labels, self.taints, self.condition, self.absent, self.small, short

    @property
    def _items(self) -> tuple[int, bool]:
        number = sum(len(reason) for reason in self._reasons if isinstance(reason, tuple))
        return number, any(resource.startswith("nvidia.com/") for resource, _ in self.short)


def judge(spec: Object, nodes: Iterable[Object], occupancy: Occupancy | None = None) -> list[Fit]:
    """Compare a pod's spec with each node. Without ``occupancy`` every node counts as empty."""
    wanted = placement.requests(spec) | {_PODS: Decimal(1)}
    return [_judge(spec, wanted, node, occupancy) for node in nodes]


def _judge(
    spec: Object, wanted: dict[str, Decimal], node: Object, occupancy: Occupancy | None
) -> Fit:
    name = node["metadata"]["name"]
    taints = placement.untolerated(spec, node)
    offered = placement.allocatable(node)
    offered.setdefault(_PODS, Decimal(1_000_000))
    zero = Decimal(0)
    lacking = sorted(one for one, amount in wanted.items() if amount > offered.get(one, zero))
    short: tuple[tuple[str, Decimal], ...] = ()
    if occupancy is not None:
        missing = {
            resource: amount + occupancy.taken(name, resource) - offered.get(resource, zero)
            for resource, amount in wanted.items()
            if resource not in lacking and amount > 0
        }
        short = tuple((resource, amount) for resource, amount in missing.items() if amount > 0)
    return Fit(
        name,
        labels=tuple(placement.unmet(spec, node)),
        taints=tuple(
            (taint["key"], taint.get("value") or "", taint["effect"])
            for taint in taints
            if not _CONDITION.match(taint["key"])
        ),
        condition=_condition(spec, node, [taint["key"] for taint in taints]),
        absent=tuple(one for one in lacking if not offered.get(one)),
        small=tuple(one for one in lacking if offered.get(one)),
        short=short,
    )


def _condition(spec: Object, node: Object, taints: Sequence[str]) -> tuple[str, ...]:
    found = {_NAMED.get(key, key.rpartition("/")[2]) for key in taints if _CONDITION.match(key)}
    cordon = {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}
    if (node.get("spec") or {}).get("unschedulable") and placement.untolerated(
        spec, {"spec": {"taints": [cordon]}}
    ):
        found.add("cordoned")
    for condition in (node.get("status") or {}).get("conditions") or ():
        if condition["type"] == "Ready" and condition["status"] != "True":
            found.add("not ready")
    return tuple(sorted(found))


def nearest(fits: Sequence[Fit]) -> list[Fit]:
    """Return the nodes that come nearest to taking the pod, all for the very same reasons.

    A node that fits and is full comes before one that is cordoned, then one with a taint, one that
    is too small, one with other labels, and one without a GPU.
    """
    if not fits:
        return []
    alike: dict[tuple[object, ...], list[Fit]] = {}
    for fit in fits:
        alike.setdefault(fit._reasons, []).append(fit)
    return min(
        alike.values(),
        key=lambda group: (group[0]._cost, group[0]._items, -len(group), group[0].node),
    )
