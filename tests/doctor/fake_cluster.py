"""A Kubernetes API server, and the objects that it has.

It answers the official client over HTTP, with objects that the client's own models have read and
written back unchanged, so that no field is made up.
"""

import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import yaml
from kubernetes.client import ApiClient

from tests.fakes.http_server import QuietHandler, serving

_MODELS = {
    "daemonsets.apps": "V1DaemonSet",
    "deployments.apps": "V1Deployment",
    "events": "CoreV1Event",
    "nodes": "V1Node",
    "persistentvolumeclaims": "V1PersistentVolumeClaim",
    "pods": "V1Pod",
    "secrets": "V1Secret",
    "storageclasses.storage.k8s.io": "V1StorageClass",
}


def _check(model: str, content: dict[str, Any]) -> None:
    """Check that the client reads it as ``model`` without losing a field."""
    with ApiClient() as client:
        read = client.deserialize(json.dumps(content), model, "application/json")
        assert client.sanitize_for_serialization(read) == content


BUILT_IN = {
    "v1": (
        *("ConfigMap", "Namespace", "PersistentVolumeClaim", "Secret"),
        *("Service", "ServiceAccount"),
    ),
    "apps/v1": ("DaemonSet", "Deployment", "StatefulSet"),
    "networking.k8s.io/v1": ("NetworkPolicy",),
    "policy/v1": ("PodDisruptionBudget",),
    "storage.k8s.io/v1": ("StorageClass",),
}
"""Kinds of every Kubernetes that the manifests use, by ``apiVersion``."""

MONITORING = {"monitoring.coreos.com/v1": ("PodMonitor", "PrometheusRule", "ServiceMonitor")}

TOKEN = "of-the-tests"


class FakeApi:
    """A Kubernetes API server on a loopback port, with the objects of the test."""

    def __init__(self) -> None:
        self.objects: dict[str, list[dict[str, Any]]] = {}
        self.refusals: dict[str, int] = {}
        """HTTP status by resource, or by path."""
        self.ray: dict[str, list[str]] = {}
        """Resources of the API group ray.io by version."""
        self.kinds: dict[str, tuple[str, ...]] = dict(BUILT_IN)
        """Kinds of the other groups that are served, by ``apiVersion``."""
        self.asked: list[str] = []
        api = self

        class Handler(QuietHandler):
            def do_GET(self) -> None:  # noqa: N802  # http.server's name
                self.respond_json(*api.answer(self.path, self.headers.get("Authorization", "")))

        self.handler: type[BaseHTTPRequestHandler] = Handler
        self.url = ""

    @contextmanager
    def serving(self) -> Iterator["FakeApi"]:
        with serving(self.handler) as self.url:
            yield self

    def put(self, resource: str, *objects: Mapping[str, Any]) -> None:
        """Set all objects of ``resource``."""
        checked = [dict(one) for one in objects]
        if (model := _MODELS.get(resource)) is not None:
            for one in checked:
                _check(model, one)
        self.objects[resource] = checked

    def answer(self, path: str, authorization: str) -> tuple[int, dict[str, Any]]:
        self.asked.append(path)
        if authorization != f"Bearer {TOKEN}":
            return 401, {"message": "Unauthorized"}
        if path == "/version":
            return self.refusals.get("version", 200), {"gitVersion": "v1.34.1"}
        if path.startswith("/apis/ray.io") and path.count("/") < 4:
            return self._discovery(path.rpartition("ray.io")[2].strip("/"))
        parts = path.strip("/").split("/")
        if len(parts) == (2 if parts[0] == "api" else 3):
            if (status := self.refusals.get(path)) is not None:
                return status, {"message": "etcdserver: request timed out"}
            return self._kinds("/".join(parts[1:]))
        if parts[-2] == "secrets":
            return self._secret(parts[-3], parts[-1])
        group = "" if parts[0] == "api" else f".{parts[1]}"
        resource = parts[-1] + group
        if (status := self.refusals.get(path, self.refusals.get(resource))) is not None:
            return status, {
                "message": f'{parts[-1]} is forbidden: User "jane" cannot list resource '
                f'"{parts[-1]}" in API group "{group[1:]}"'
                if status == 403
                else "etcdserver: request timed out"
            }
        if resource not in self.objects:
            return 404, {"message": "the server could not find the requested resource"}
        found = self.objects[resource]
        if "namespaces" in parts:
            namespace = parts[parts.index("namespaces") + 1]
            found = [one for one in found if one["metadata"].get("namespace") == namespace]
        return 200, {"items": found}

    def _secret(self, namespace: str, name: str) -> tuple[int, dict[str, Any]]:
        if (status := self.refusals.get("secrets")) is not None:
            return status, {"message": f'secrets "{name}" is forbidden: User "jane" cannot get it'}
        for one in self.objects.get("secrets", ()):
            if (one["metadata"]["namespace"], one["metadata"]["name"]) == (namespace, name):
                return 200, one
        return 404, {"message": f'secrets "{name}" not found'}

    def _kinds(self, api_version: str) -> tuple[int, dict[str, Any]]:
        if api_version not in self.kinds:
            return 404, {"message": "404 page not found"}
        resources = [
            {
                "name": f"{kind.lower()}s",
                "singularName": "",
                "namespaced": True,
                "kind": kind,
                "verbs": ["list"],
            }
            for kind in self.kinds[api_version]
        ]
        answer = {"groupVersion": api_version, "resources": resources}
        _check("V1APIResourceList", answer)
        return 200, answer

    def _discovery(self, version: str) -> tuple[int, dict[str, Any]]:
        if version not in ("", *self.ray) or not self.ray:
            return 404, {"message": "404 page not found"}
        if not version:
            versions = [{"groupVersion": f"ray.io/{one}", "version": one} for one in self.ray]
            group = {"name": "ray.io", "versions": versions}
            _check("V1APIGroup", group)
            return 200, group
        resources = [
            {"name": one, "singularName": "", "namespaced": True, "kind": "Ray", "verbs": ["list"]}
            for one in self.ray[version]
        ]
        answer = {"groupVersion": f"ray.io/{version}", "resources": resources}
        _check("V1APIResourceList", answer)
        return 200, answer

    def kubeconfig(self, folder: Path, token: str = TOKEN, url: str | None = None) -> Path:
        """Write a kubeconfig whose context has the namespace `images`."""
        path = folder / "kubeconfig"
        context = {"cluster": "fake", "user": "jane", "namespace": "images"}
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "fake",
                    "clusters": [{"name": "fake", "cluster": {"server": url or self.url}}],
                    "users": [{"name": "jane", "user": {"token": token}}],
                    "contexts": [{"name": "fake", "context": context}],
                }
            )
        )
        return path


RAY = importlib.metadata.version("ray")
TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
TOLERATION = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
Object = dict[str, Any]


def workload(name: str, image: str, status: Object) -> Object:
    """Make a deployment or a daemonset."""
    return {
        "metadata": {"name": name, "namespace": "system"},
        "spec": {
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"containers": [{"name": "main", "image": image}]},
            },
        },
        "status": status,
    }


def operator(tag: str = ":v1.7.0", available: int = 1, release: str | None = None) -> Object:
    """Make the operator's deployment. ``release``: the Helm release that installed it."""
    image = f"quay.io/kuberay/operator{tag}"
    deployment = workload("kuberay-operator", image, {"availableReplicas": available})
    if release is not None:
        deployment["metadata"]["annotations"] = {
            "meta.helm.sh/release-name": release,
            "meta.helm.sh/release-namespace": "system",
        }
    return deployment


def plugin(wanted: int = 1, ready: int = 1, name: str = "nvdp-nvidia-device-plugin") -> Object:
    status = {
        "currentNumberScheduled": wanted,
        "desiredNumberScheduled": wanted,
        "numberMisscheduled": 0,
        "numberReady": ready,
    }
    return workload(name, "nvcr.io/nvidia/k8s-device-plugin:v0.20.0", status)


def node(name: str, gpus: int = 0, capacity: int | None = None, **labels: str) -> Object:
    """Make a node; one with GPUs has the usual taint and labels."""
    offered = {"cpu": "8", "memory": "32Gi"}
    of_gpus = {"nvidia.com/gpu.product": "NVIDIA-L4"} if gpus else {}
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name} | of_gpus | labels},
        "spec": {"taints": [TAINT]} if gpus else {},
        "status": {
            "allocatable": offered | ({"nvidia.com/gpu": str(gpus)} if gpus else {}),
            "capacity": offered | {"nvidia.com/gpu": str(gpus if capacity is None else capacity)},
        },
    }


def service(status: Object | None = None, claim: str | None = None, **worker: Any) -> Object:
    """Make a valid RayService with a head and one group of GPU workers."""
    drain = {"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": "910"}
    volumes = [{"name": "c", "persistentVolumeClaim": {"claimName": claim}}] if claim else []
    pod = {
        "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-L4"},
        "tolerations": [TOLERATION],
        "containers": [{"name": "w", "resources": {"limits": {"nvidia.com/gpu": 1}}}],
        "terminationGracePeriodSeconds": 960,
        "volumes": volumes,
    } | worker.pop("pod", {})
    first, *others = pod["containers"]
    pod["containers"] = [first | {"env": [*first.get("env", []), drain]}, *others]
    return {
        "kind": "RayService",
        "metadata": {"name": "sdxl", "namespace": "images"},
        "spec": {
            "serveConfigV2": "applications: [{import_path: 'serve_app.app:build'}]",
            "rayClusterDeletionDelaySeconds": 1000,
            "rayClusterConfig": {
                "rayVersion": RAY,
                "headGroupSpec": {
                    "template": {
                        "spec": {
                            "containers": [{"name": "h"}],
                            "terminationGracePeriodSeconds": 60,
                        }
                    }
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "gpu",
                        "minReplicas": 1,
                        "maxReplicas": 1,
                        "template": {"spec": pod},
                    }
                    | worker
                ],
            },
        },
        "status": {"conditions": [{"type": "Ready", "status": "True"}]}
        if status is None
        else status,
    }


def pod(name: str, **status: Any) -> Object:
    return {
        "metadata": {"name": name, "namespace": "images"},
        "spec": {"containers": [{"name": "main"}]},
        "status": {"phase": "Pending"} | status,
    }


def on(node: str, name: str, namespace: str = "images", **requests: str) -> Object:
    """Make a pod that runs on ``node`` with ``requests``."""
    running = pod(name, phase="Running")
    running["metadata"]["namespace"] = namespace
    container = {"name": "main", "resources": {"requests": requests, "limits": requests}}
    running["spec"] = {"nodeName": node, "containers": [container]}
    return running


def unscheduled(
    name: str,
    message: str,
    reason: str = "Unschedulable",
    ray_cluster: str | None = None,
    **spec: Any,
) -> Object:
    """Make a pod without a node. ``ray_cluster``: its owner; ``spec``: the pod's."""
    condition = {"type": "PodScheduled", "status": "False", "reason": reason, "message": message}
    stuck = pod(name, conditions=[condition])
    stuck["spec"] |= spec
    if ray_cluster is not None:
        stuck["metadata"]["labels"] = {"ray.io/cluster": ray_cluster}
    return stuck


def secret(name: str, *keys: str) -> Object:
    return {
        "metadata": {"name": name, "namespace": "images"},
        "data": dict.fromkeys(keys, "aGlkZGVu"),
    }


def waiting(name: str, reason: str, message: str | None = None, phase: str = "Pending") -> Object:
    state = {"reason": reason} | ({"message": message} if message else {})
    container = {
        "name": "main",
        "image": "app",
        "imageID": "",
        "ready": False,
        "restartCount": 0,
        "state": {"waiting": state},
    }
    return pod(name, phase=phase, containerStatuses=[container])


def ended(name: str, code: int, reason: str, phase: str = "Failed") -> Object:
    """Make a pod with a container of Ray that ended beside one that runs."""
    states = {
        "autoscaler": {"running": {}},
        "ray-head": {"terminated": {"exitCode": code, "reason": reason}},
    }
    containers = [
        {
            "name": container,
            "image": "app",
            "imageID": "",
            "ready": False,
            "restartCount": 0,
            "state": state,
        }
        for container, state in states.items()
    ]
    return pod(name, phase=phase, containerStatuses=containers)


def event(
    name: str, reason: str, message: str, minute: int, kind: str = "Pod", type_: str = "Warning"
) -> Object:
    """Make an event of the object ``name``."""
    return {
        "metadata": {"name": f"{name}.{minute}", "namespace": "images"},
        "involvedObject": {"kind": kind, "name": name, "namespace": "images"},
        "type": type_,
        "reason": reason,
        "message": message,
        "lastTimestamp": f"2026-01-01T00:{minute:02}:00+00:00",
    }


def claim(phase: str = "Pending", **spec: str) -> Object:
    return {
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "weights", "namespace": "images"},
        "spec": spec,
        "status": {"phase": phase},
    }


def storage_class(name: str, default: bool = False) -> Object:
    annotation = {"storageclass.kubernetes.io/is-default-class": "true"}
    annotations = {"annotations": annotation} if default else {}
    return {"metadata": {"name": name} | annotations, "provisioner": "example.com/disk"}
