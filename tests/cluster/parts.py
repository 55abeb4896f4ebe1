"""Readers of a rendered overlay's parts, and the ports that it uses."""

from decimal import Decimal
from pathlib import Path
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from tests.cluster.manifests import Manifests, Pod

ROOT = Path(__file__).parents[2]

PORTS = {
    "serve": 8000,
    "metrics": 8080,
    "dashboard": 8265,
    "dashboard-agent": 52365,
    "redis": 6379,
    "https": 443,
    "dns": 53,
    "kubernetes": 6443,
    "otlp": 4318,
}
"""Number by name, for all ports: those of the service, of Ray, and of called services."""


def gpus_of(pod: Pod) -> Decimal:
    """Return the requested GPUs, whole or in MIG instances."""
    limits = pod.spec["containers"][0].get("resources", {}).get("limits", {})
    return sum(
        (parse_quantity(number) for name, number in limits.items() if is_gpu(name)), Decimal(0)
    )


def is_gpu(resource: str) -> bool:
    return resource.startswith("nvidia.com/")


def worker(manifests: Manifests, group: str) -> Pod:
    [pod] = [pod for pod in manifests.pods if pod.group == group]
    return pod


def variables(container: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one.get("value", "") for one in container.get("env", [])}


def group_path(group: str, field: str) -> str:
    return f"RayService/diffusion-serve: spec.rayClusterConfig.workerGroupSpecs[{group}].{field}"
