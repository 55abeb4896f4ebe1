"""The shape of a rule, and reading a document that no schema has checked yet."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.doctor.kube import Object


@dataclass(frozen=True)
class Refusal:
    """One reason for which KubeRay's operator refuses a document."""

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
        """Environment of the Ray container, which is the first; values from elsewhere are empty."""
        containers = mappings(self.pod.get("containers"))
        return environment(containers[0].get("env")) if containers else {}

    @property
    def variables_path(self) -> str:
        return f"{self.pod_path}.containers[0].env"


@dataclass(frozen=True)
class RayCluster:
    """A RayCluster's spec, its own or a RayService's, and what decides with it."""

    spec: Mapping[str, Any]
    path: str
    """The spec's path in the document."""
    annotations: Mapping[str, Any]
    gates: frozenset[str]
    """Feature gates that the operator has on."""

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
        """Whether the operator takes the autoscaler for v2: only if its version says so."""
        return self.autoscaling and self.autoscaler.get("version") == "v2"

    @property
    def fault_tolerance(self) -> Mapping[str, Any] | None:
        options = self.spec.get("gcsFaultToleranceOptions")
        return None if options is None else mapping(options)


Rule = Callable[[RayCluster], Iterator[Refusal]]
ServiceRule = Callable[[Object], Iterator[Refusal]]


def mapping(value: object) -> Mapping[str, Any]:
    """``value``, or an empty mapping where something else stands."""
    return value if isinstance(value, Mapping) else {}


def mappings(value: object) -> list[Mapping[str, Any]]:
    return [mapping(one) for one in value] if isinstance(value, list) else []


def environment(value: object) -> dict[str, str]:
    """Names and values of a container's ``env``."""
    return {str(one.get("name")): str(one.get("value", "")) for one in mappings(value)}


def number(value: object) -> int | None:
    """A whole number; None for anything else, which the CRD's schema refuses."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def version(value: object) -> tuple[int, ...] | None:
    """A version as the operator reads it: ``v`` and what follows the numbers do not count."""
    match = re.match(r"\s*v?([0-9]+(?:\.[0-9]+)+)", str(value or ""))
    return tuple(int(part) for part in match[1].split(".")) if match else None
