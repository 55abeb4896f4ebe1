"""A fake cluster for the doctor's checks."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.doctor.fake_cluster import FakeApi, node, operator, plugin, pod, service


@pytest.fixture
def api() -> Iterator[FakeApi]:
    """A cluster in which nothing is wrong."""
    with FakeApi().serving() as api:
        api.ray = {
            "v1alpha1": ["rayservices"],
            "v1": ["rayservices", "rayservices/status", "rayclusters"],
        }
        api.put("deployments.apps", operator())
        api.put("daemonsets.apps", plugin())
        api.put("nodes", node("cpu-1"), node("gpu-1", gpus=1))
        api.put("rayservices.ray.io", service())
        api.put("rayclusters.ray.io")
        api.put("persistentvolumeclaims")
        api.put("storageclasses.storage.k8s.io")
        api.put("pods", pod("head", phase="Running"))
        api.put("events")
        api.put("secrets")
        yield api


@pytest.fixture
def kubeconfig(api: FakeApi, tmp_path: Path) -> Path:
    return api.kubeconfig(tmp_path)
