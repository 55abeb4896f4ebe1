"""A Kubernetes API server that is written to, with KubeRay's operator, a scheduler and kubelets.

They do what is seen of the real ones in a rehearsal, each time that `FakeClock` passes on; a test
says what goes wrong. Pods' ports answer through port forwards and the API server's proxy.
"""

import base64
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from PIL import Image

from serve_app.gateway.auth import digest, parse_keys
from tests.doctor.fake_cluster import TOKEN, FakeApi, Object, node, operator
from tests.doctor.fake_pod_port import forward_port

HASH = "ray.io/hash-without-replicas-and-workers-to-delete"
_SERVICE_FIELDS = {
    "serveConfigV2", "rayClusterConfig", "upgradeStrategy", "excludeHeadPodFromServeSvc",
    "rayClusterDeletionDelaySeconds",
}  # fmt: skip
_KINDS = {
    "v1": [
        ("Namespace", "namespaces", False), ("Node", "nodes", False), ("Pod", "pods", True),
        ("Secret", "secrets", True), ("Service", "services", True),
        ("ServiceAccount", "serviceaccounts", True),
        ("PersistentVolumeClaim", "persistentvolumeclaims", True),
    ],
    "apps/v1": [("Deployment", "deployments", True), ("StatefulSet", "statefulsets", True)],
    "discovery.k8s.io/v1": [("EndpointSlice", "endpointslices", True)],
    "monitoring.coreos.com/v1": [("PodMonitor", "podmonitors", True)],
    "policy/v1": [("PodDisruptionBudget", "poddisruptionbudgets", True)],
    "ray.io/v1": [("RayService", "rayservices", True), ("RayCluster", "rayclusters", True)],
    "rbac.authorization.k8s.io/v1": [("ClusterRole", "clusterroles", False)],
}  # fmt: skip


class FakeClock:
    """Seconds that pass when somebody sleeps."""

    def __init__(self, *passed: Callable[[float], None]) -> None:
        """``passed``: called with the time after each pause."""
        self._now = 0.0
        self._passed = passed

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds
        for one in self._passed:
            one(self._now)


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    return file.getvalue()


class OperatorApi(FakeApi):
    """The API server, and all that works on its objects."""

    def __init__(self) -> None:
        super().__init__()
        self.kubelet = "runs"
        """Or `none`, or `kwok`: pods are marked as running."""
        self.gpus = 2
        self.refusal = ""
        """Why the operator refuses RayServices."""
        self.replaces_in_place = False
        """Whether another Serve config costs a RayCluster."""
        self.makes_nothing = False
        self.dashboard = True
        """Whether the application ever runs; `kwok` has no dashboard by itself."""
        self.finalizer_s = 4.0
        """How long a RayCluster takes to end."""
        self.namespace_stays = False
        self.port_refuses = False
        self.answer_of_pod: Callable[[int], tuple[int, Object]] = lambda _: (
            200, {"data": [{"b64_json": base64.b64encode(png()).decode()}]},
        )  # fmt: skip
        """Of the application, by the number of requests before."""
        self.asked_of_pods = 0
        self.away = False
        """Whether the API server is being replaced."""
        self.writes: list[tuple[str, str]] = []
        """Methods and paths."""
        self.dry_runs: list[str] = []
        self.deleted: list[str] = []
        self.forbidden: set[tuple[str, str]] = set()
        """Methods and resources."""
        self.now = 0.0
        self.ray = {"v1": ["rayservices", "rayclusters"]}
        self.store: dict[str, Object] = {}
        """Objects by path."""
        self._drawn = 0
        self._delete_at: dict[str, float] = {}
        self._sent: dict[str, str] = {}
        self.put("deployments.apps", operator())
        self.put("nodes", _node())
        self.put("storageclasses.storage.k8s.io")
        self._server.RequestHandlerClass = _handler(self)

    # The API server.

    def handle(self, method: str, url: str, headers: Any, body: bytes) -> tuple[int, Object]:
        path, query = urlsplit(url).path, dict(parse_qsl(urlsplit(url).query))
        if headers.get("Authorization", "") != f"Bearer {TOKEN}":
            return 401, {"message": "Unauthorized"}
        if self.away:
            return 503, {"message": "the server is currently unable to handle the request"}
        parts = path.strip("/").split("/")
        version_parts = 2 if parts[0] == "api" else 3
        version = "/".join(parts[1:version_parts])
        rest = parts[version_parts:]
        if rest and rest[0] == "namespaces" and len(rest) > 2:
            rest = rest[2:]
        if "proxy" in rest:
            return self._pod(headers.get("X-Key", ""), parts[-6].partition(":")[0], refused=503)
        if rest and (method, rest[0]) in self.forbidden:
            verb = {"POST": "create", "PATCH": "patch", "DELETE": "delete"}[method]
            return 403, {
                "message": f'{rest[0]} is forbidden: User "jane" cannot {verb} resource "{rest[0]}"'
            }
        if method == "GET":
            return self._get(path, version, rest, query)
        self.writes.append((method, path))
        content = json.loads(body)
        if method == "POST":
            path = f"{path}/{content['metadata']['name']}"
            return 201, self._save(path, content)
        if method == "PATCH":
            assert headers["Content-Type"] == "application/apply-patch+yaml"
            assert query["fieldManager"] == "diffusion-serve-rehearsal"
            return self._apply(path, content, query)
        return self._delete(path, content)

    def _get(self, path: str, version: str, rest: list[str], query: Object) -> tuple[int, Object]:
        if not rest and version in _KINDS:
            names = ("kind", "name", "namespaced")
            return 200, {
                "resources": [dict(zip(names, one, strict=True)) for one in _KINDS[version]]
            }
        if path in self.store:
            return 200, self.store[path]
        if len(rest) == 1 and rest[0] in (
            "pods", "rayclusters", "rayservices", "endpointslices", "events", "namespaces",
        ):  # fmt: skip
            wanted = query.get("labelSelector", "").partition("=")
            return 200, {"items": [
                one for one in self._below(path)
                if not wanted[0] or one["metadata"].get("labels", {}).get(wanted[0]) == wanted[2]
            ]}  # fmt: skip
        if len(rest) > 1:
            return 404, {"message": "not found"}
        return super().answer(path, f"Bearer {TOKEN}")

    def _below(self, path: str) -> list[Object]:
        return [
            one for key, one in self.store.items()
            if key.startswith(path + "/") and "/" not in key[len(path) + 1 :]
        ]  # fmt: skip

    def _save(self, path: str, content: Object) -> Object:
        old = self.store.get(path, {})
        self._drawn += 1
        metadata = {"uid": f"uid-{self._drawn}", "generation": 1} | content["metadata"]
        if old:
            metadata["uid"] = old["metadata"]["uid"]
        self.store[path] = content | {"metadata": metadata}
        if "status" in old:
            self.store[path]["status"] = old["status"]
        return self.store[path]

    def _apply(self, path: str, content: Object, query: Object) -> tuple[int, Object]:
        assert query["fieldValidation"] == "Strict"
        assert query["force"] == "true"
        if content["kind"] == "RayService" and (more := set(content["spec"]) - _SERVICE_FIELDS):
            return 400, {"message": f'strict decoding error: unknown field "spec.{more.pop()}"'}
        if query.get("dryRun") == "All":
            self.dry_runs.append(content["kind"])
            return 200, content
        return 200, self._save(path, content)

    def _delete(self, path: str, options: Object) -> tuple[int, Object]:
        if path not in self.store:
            return 404, {"message": "not found"}
        found = self.store[path]
        if options.get("preconditions", {}).get("uid") not in (None, found["metadata"]["uid"]):
            return 409, {"message": "the UID in the precondition does not match"}
        self.deleted.append(path)
        if options.get("gracePeriodSeconds") == 0 or "/rayservices/" in path:
            del self.store[path]
        else:
            found["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        return 200, {}

    def _pod(self, authorization: str, pod: str, refused: int = 200) -> tuple[int, Object]:
        if self.port_refuses or not any(key.endswith(f"/pods/{pod}") for key in self.store):
            return refused, {"kind": "Status", "message": "dial tcp: connection refused"}
        for path, one in self.store.items():
            if path.endswith("/secrets/api-keys"):
                entries = parse_keys(base64.b64decode(one["data"]["keys.yaml"]).decode(), "test")
                if digest(authorization.removeprefix("Bearer ")) not in [
                    entry.sha256 for entry in entries
                ]:
                    return 401, {"error": {"message": "this API key is not known here."}}
        self.asked_of_pods += 1
        return self.answer_of_pod(self.asked_of_pods - 1)

    # What works on the objects.

    def advance(self, now: float) -> None:
        self.now = now
        for path, one in list(self.store.items()):
            if "/rayservices/" in path and not self.makes_nothing:
                self._reconcile(path, one)
        self._end()
        self._schedule()

    def _reconcile(self, path: str, service: Object) -> None:
        root = path.partition("/rayservices/")[0]
        status = service.setdefault(
            "status", {"activeServiceStatus": {}, "pendingServiceStatus": {}}
        )
        if self.refusal:
            status["conditions"] = [
                {"type": "Ready", "status": "False", "reason": "ValidationFailed",
                 "message": self.refusal}
            ]  # fmt: skip
            return
        active, pending = status["activeServiceStatus"], status["pendingServiceStatus"]
        wanted = service["spec"] if self.replaces_in_place else service["spec"]["rayClusterConfig"]
        goal = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:8]
        newest = (pending or active).get("rayClusterName", "")
        there = {one["metadata"]["name"]: one for one in self._below(f"{root}/rayclusters")}
        status.setdefault("conditions", [
            {"type": "Ready", "status": "False", "reason": "Initializing", "message": "starting"}
        ])  # fmt: skip
        if (there.get(newest, {}).get("metadata", {}).get("annotations") or {}).get(HASH) != goal:
            if self.kubelet == "kwok" and newest:
                return  # the operator waits for a dashboard that nobody answers
            newest = f"{service['metadata']['name']}-{len(self._delete_at) + len(there) + 1}"
            status["pendingServiceStatus"] = {"rayClusterName": newest}
            self._make(root, newest, goal, service)
            return
        kept = {active.get("rayClusterName"), pending.get("rayClusterName")}
        delay_s = service["spec"].get("rayClusterDeletionDelaySeconds", 60)
        for name in set(there) - kept:
            if self._delete_at.setdefault(name, self.now + delay_s) <= self.now:
                there[name]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        pods = [one for one in self._pods() if _cluster_of(one) == newest]
        starting = [one for one in pods if one["status"]["phase"] != "Running"]
        if self.kubelet == "runs" and self.dashboard and pods and not starting:
            self._serve(path, service, status, newest, pods)

    def _serve(
        self, path: str, service: Object, status: Object, name: str, pods: list[Object]
    ) -> None:
        applications = {"applicationStatuses": {"diffusion-serve": {"status": "RUNNING"}}}
        status["activeServiceStatus"] = {"rayClusterName": name} | applications
        status["pendingServiceStatus"] = {}
        status["conditions"] = [
            {"type": "Ready", "status": "True", "reason": "NonZeroServeEndpoints", "message": "up"}
        ]
        namespace = path.split("/")[5]
        if self._sent.get(name) != service["spec"]["serveConfigV2"]:
            self._sent[name] = service["spec"]["serveConfigV2"]
            self._drawn += 1
            self.store[f"/api/v1/namespaces/{namespace}/events/e{self._drawn}"] = {
                "metadata": {"name": f"e{self._drawn}"}, "type": "Normal", "count": 1,
                "involvedObject": {"kind": "RayService"}, "reason": "UpdatedServeApplications",
            }  # fmt: skip
        root = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        serve = f"{service['metadata']['name']}-serve-svc"
        self.store[f"{root}/{serve}"] = {
            "metadata": {"name": serve, "labels": {"kubernetes.io/service-name": serve}},
            "endpoints": [
                {"targetRef": {"name": one["metadata"]["name"]}, "conditions": {"ready": True}}
                for one in pods
                if one["metadata"]["labels"]["ray.io/node-type"] == "worker"
            ],
        }

    def _make(self, root: str, name: str, goal: str, service: Object) -> None:
        self._save(
            f"{root}/rayclusters/{name}",
            {"metadata": {"name": name, "annotations": {HASH: goal}}, "status": {}},
        )
        spec = service["spec"]["rayClusterConfig"]
        self._make_pod(root, name, "head", "head", spec["headGroupSpec"])
        for group in spec.get("workerGroupSpecs") or ():
            for _ in range(group["minReplicas"]):
                self._make_pod(root, name, "worker", group["groupName"], group)

    def _make_pod(self, root: str, cluster: str, kind: str, group: str, template: Object) -> None:
        self._drawn += 1
        name = f"{cluster}-{group}-{self._drawn}"
        namespace = root.rpartition("/")[2]
        labels = {"ray.io/cluster": cluster, "ray.io/node-type": kind, "ray.io/group": group}
        self._save(f"/api/v1/namespaces/{namespace}/pods/{name}", {
            "metadata": {"name": name, "namespace": namespace, "labels": labels},
            "spec": {"containers": template["template"]["spec"]["containers"]},
            "status": {"phase": "Pending"},
        })  # fmt: skip

    def _pods(self) -> Iterator[Object]:
        return iter([one for path, one in self.store.items() if "/pods/" in path])

    def _schedule(self) -> None:
        taken = sum(_gpus(one) for one in self._pods() if one["spec"].get("nodeName"))
        for pod in self._pods():
            status = pod["status"]
            if not pod["spec"].get("nodeName"):
                if taken + _gpus(pod) > self.gpus and _gpus(pod):
                    status["conditions"] = [
                        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                         "message": "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."}
                    ]  # fmt: skip
                    continue
                taken += _gpus(pod)
                pod["spec"]["nodeName"] = "gpu-1"
                status["conditions"] = [{"type": "PodScheduled", "status": "True"}]
            elif self.kubelet != "none":
                state = {"name": "main", "ready": True, "state": {"running": {}}}
                state |= {"containerID": "containerd://1"} if self.kubelet == "runs" else {}
                status.update(phase="Running", startTime="2026-01-01T00:00:00Z")
                status["containerStatuses"] = [state]

    def _end(self) -> None:
        services = [path for path in self.store if "/rayservices/" in path]
        for path, one in list(self.store.items()):
            if "/rayclusters/" in path:
                metadata = one["metadata"]
                if not services or metadata.get("deletionTimestamp"):
                    ends_at = self._delete_at.setdefault(
                        f"{path} ends", self.now + self.finalizer_s
                    )
                    for pod in self._pods():
                        if _cluster_of(pod) == metadata["name"]:
                            pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
                    if self.now >= ends_at:
                        del self.store[path]
            if "/pods/" in path and one["metadata"].get("deletionTimestamp"):
                bound = one["spec"].get("nodeName")
                if not bound or self.kubelet != "none":
                    self.store.pop(path, None)
        for path, one in list(self.store.items()):
            ends = one["metadata"].get("deletionTimestamp") and path.count("/") == 4
            inside = [key for key in self.store if f"{path.rpartition('/')[2]}/" in key]
            left = [key for key in inside if "/pods/" in key or "/rayclusters/" in key]
            if ends and not left and not self.namespace_stays:
                for key in [path, *inside]:
                    del self.store[key]


def _node() -> Object:
    """A node with a kubelet, which says what it is."""
    one = node("gpu-1", gpus=8)
    fields = (
        "architecture", "bootID", "containerRuntimeVersion", "kernelVersion", "kubeProxyVersion",
        "kubeletVersion", "machineID", "operatingSystem", "osImage", "systemUUID",
    )  # fmt: skip
    info = dict.fromkeys(fields, "") | {"containerRuntimeVersion": "containerd://2.1"}
    return one | {"status": one["status"] | {"nodeInfo": info}}


def _cluster_of(pod: Object) -> str:
    return str(pod["metadata"]["labels"]["ray.io/cluster"])


def _gpus(pod: Object) -> int:
    [container, *_] = pod["spec"]["containers"]
    limits = (container.get("resources") or {}).get("limits") or {}
    return int(limits.get("nvidia.com/gpu", 0))


def _handler(api: OperatorApi) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            if self.headers.get("Upgrade", "").lower() == "websocket":
                pod = self.path.partition("/pods/")[2].partition("/")[0]
                forward_port(self, api.port_refuses, lambda key: api._pod(key, pod))
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, answer = api.handle(self.command, self.path, self.headers, body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = do_DELETE = _any  # noqa: N815  # http.server's names

        def log_message(self, *args: object) -> None:
            pass

    return Handler
