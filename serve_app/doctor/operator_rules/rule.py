"""The type of a rule, and readers of documents that no schema has checked yet."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.doctor.kube import Object


@dataclass(frozen=True)
class Refusal:
    """One reason for which KubeRay's operator rejects a document."""

    rule: str
    field: str
    """Path in the document, with a worker group's name as its index."""
    found: str
    advice: str


@dataclass(frozen=True)
class Node:
    """The head, or a worker group."""

    path: str
    spec: Mapping[str, Any]

    @property
    def start_params(self) -> Mapping[str, Any]:
        return mapping(self.spec.get("rayStartParams"))

    @property
    def pod(self) -> Mapping[str, Any]:
        return mapping(mapping(self.spec.get("template")).get("spec"))

    @property
    def pod_path(self) -> str:
        return f"{self.path}.template.spec"

    @property
    def variables(self) -> dict[str, str]:
        """Environment of the first container, which runs Ray; values from elsewhere are empty."""
        containers = mappings(self.pod.get("containers"))
        return environment(containers[0].get("env")) if containers else {}

    @property
    def variables_path(self) -> str:
        return f"{self.pod_path}.containers[0].env"

    @property
    def labels(self) -> dict[str, str]:
        """Labels of the Ray node."""
        return {str(name): str(it) for name, it in mapping(self.spec.get("labels")).items()}


@dataclass(frozen=True)
class RayCluster:
    """A RayCluster's spec, its own or a RayService's, with annotations and feature gates."""

    spec: Mapping[str, Any]
    path: str
    """The spec's path in the document."""
    annotations: Mapping[str, Any]
    gates: frozenset[str]
    """Feature gates that are on in the operator."""

    @classmethod
    def of_service(cls, service: Object) -> "RayCluster":
        """Return the RayCluster that a RayService describes, as far as its pods are concerned."""
        spec = mapping(mapping(service.get("spec")).get("rayClusterConfig"))
        return cls(spec, "spec.rayClusterConfig", {}, frozenset())

    @property
    def head(self) -> Node:
        return Node(f"{self.path}.headGroupSpec", mapping(self.spec.get("headGroupSpec")))

    @property
    def groups(self) -> list[Node]:
        return [
            Node(f"{self.path}.workerGroupSpecs[{group.get('groupName')}]", group)
            for group in mappings(self.spec.get("workerGroupSpecs"))
        ]

    @property
    def nodes(self) -> list[Node]:
        return [self.head, *self.groups]

    @property
    def autoscaling(self) -> bool:
        return self.spec.get("enableInTreeAutoscaling") is True

    @property
    def autoscaler(self) -> Mapping[str, Any]:
        return mapping(self.spec.get("autoscalerOptions"))

    @property
    def has_v2(self) -> bool:
        """True if the operator uses autoscaler v2: only its version decides."""
        return self.autoscaling and self.autoscaler.get("version") == "v2"

    @property
    def fault_tolerance(self) -> Mapping[str, Any] | None:
        options = self.spec.get("gcsFaultToleranceOptions")
        return None if options is None else mapping(options)


Rule = Callable[[RayCluster], Iterator[Refusal]]
ServiceRule = Callable[[Object], Iterator[Refusal]]


def mapping(value: object) -> Mapping[str, Any]:
    """Return ``value``, or an empty mapping if it is none."""
    return value if isinstance(value, Mapping) else {}


def mappings(value: object) -> list[Mapping[str, Any]]:
    return [mapping(one) for one in value] if isinstance(value, list) else []


def environment(value: object) -> dict[str, str]:
    """Return names and values of a container's ``env``."""
    return {str(one.get("name")): str(one.get("value", "")) for one in mappings(value)}


def number(value: object) -> int | None:
    """Return a whole number; None for other values, which the CRD's schema rejects."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def version(value: object) -> tuple[int, ...] | None:
    """Parse a version as the operator does: ``v`` and any suffix do not count."""
    match = re.match(r"\s*v?([0-9]+(?:\.[0-9]+)+)", str(value or ""))
    return tuple(int(part) for part in match[1].split(".")) if match else None
