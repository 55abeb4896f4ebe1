"""The groups of pods on which Ray may place the replicas of each deployment.

Ray compares the labels of a node with the deployment's ``label_selector``. KubeRay gives a node the
``labels`` of its group, and Ray's autoscaler knows them before there is a node. A replica that no
group can take waits forever. Pure: reads a RayService as the API returns it.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.config.deployment_names import GATEWAY
from serve_app.config.models import parse_app_config
from serve_app.doctor import placement
from serve_app.doctor.kube import Object
from serve_app.doctor.operator_rules.rule import Node, RayCluster, mapping
from serve_app.doctor.serve_config import applications, deployments

NO_GATEWAY = {"diffusion-serve/gateway": "no"}
"""Labels of a worker group without gateways."""

# `ray_actor_options` of the code, as far as they choose a node.
_GENERATOR_OPTIONS: Mapping[str, Any] = {"num_gpus": 1}
_GATEWAY_OPTIONS: Mapping[str, Any] = {
    "label_selector": {name: f"!{value}" for name, value in NO_GATEWAY.items()}
}


@dataclass(frozen=True)
class Placed:
    """A deployment, and the groups that can take its replicas."""

    deployment: str
    selector: Mapping[str, str]
    needs_gpu: bool
    groups: tuple[str, ...]
    """Paths of the groups in the RayService."""

    @property
    def wanted(self) -> str:
        """Format what a group must have."""
        labels = [f"{name}: {value}" for name, value in self.selector.items()]
        return " and ".join([*labels, *(["a GPU"] if self.needs_gpu else [])]) or "CPUs"


def placed(service: Object) -> Iterator[Placed]:
    """Yield each deployment with its groups.

    Raises:
        ConfigError: if this project's Serve config is missing or wrong.
    """
    nodes = [node for node in RayCluster.of_service(service).nodes if _takes_replicas(node)]
    for application in applications(service):
        config, given = parse_app_config(application.get("args") or {}), deployments(application)
        for name in (*config.generators, GATEWAY):
            # Options of the config replace all of the code's.
            actor = mapping(mapping(given.get(name)).get("ray_actor_options"))
            actor = actor or (_GATEWAY_OPTIONS if name == GATEWAY else _GENERATOR_OPTIONS)
            selector = {
                str(label): str(value)
                for label, value in mapping(actor.get("label_selector")).items()
            }
            needs_gpu = bool(actor.get("num_gpus"))
            groups = tuple(
                node.path
                for node in nodes
                if selects(selector, node.labels) and (not needs_gpu or _has_gpu(node))
            )
            yield Placed(name, selector, needs_gpu, groups)


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Return whether Ray finds these labels to match: ``a``, ``!a``, ``in(a, b)``, ``!in(a, b)``.

    A label that is missing has no value, so that it matches a selector with ``!``.
    """
    for name, text in selector.items():
        negated, inside = text.startswith("!"), text.removeprefix("!")
        several = re.fullmatch(r"in\((.*)\)", inside)
        values = several[1].replace(" ", "").split(",") if several else [inside]
        if (labels.get(name) in values) == negated:
            return False
    return True


def _takes_replicas(node: Node) -> bool:
    """Return False for a head without CPUs, as those of the project's manifests."""
    return str(node.start_params.get("num-cpus")) != "0"


def _has_gpu(node: Node) -> bool:
    if "num-gpus" in node.start_params:
        return str(node.start_params["num-gpus"]) != "0"
    requested = placement.requests(dict(node.pod))
    return any(name.startswith("nvidia.com/") and amount for name, amount in requested.items())
