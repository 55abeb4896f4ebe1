"""What works on a cluster's objects: KubeRay's operator, a scheduler, kubelets, garbage collection.

They do what is seen of the real ones in a rehearsal, each time that the clock advances; a test
says what goes wrong. Pods' ports answer through port forwards and the API server's proxy.
"""

import base64
import hashlib
import io
import json
from collections.abc import Callable, Iterator

from PIL import Image

from serve_app.gateway.auth import digest, parse_keys
from tests.doctor.fake_cluster import Object, node, operator
from tests.doctor.rehearsal.fake_writable import WritableApi

HASH = "ray.io/hash-without-replicas-and-workers-to-delete"


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    return file.getvalue()


class OperatorApi(WritableApi):
    """An API server, and all that works on its objects."""

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
        self.scales_up = False
        """Whether a node autoscaler says that it adds nodes."""
        self.incremental = False
        """Whether an upgrade waits for a Gateway, which is never programmed."""
        self.answer_of_pod: Callable[[int], tuple[int, Object]] = lambda _: (
            200, {"data": [{"b64_json": base64.b64encode(png()).decode()}]},
        )  # fmt: skip
        """Of the application, by the number of requests before."""
        self.asked_of_pods = 0
        self.now = 0.0
        self.ray = {"v1": ["rayservices", "rayclusters"]}
        self._delete_at: dict[str, float] = {}
        self._sent: dict[str, str] = {}
        self.put("deployments.apps", operator())
        self.put("nodes", _node())
        self.put("storageclasses.storage.k8s.io")

    def answer_of_port(self, authorization: str, pod: str, refused: int) -> tuple[int, Object]:
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
        there = {one["metadata"]["name"]: one for one in self.below(f"{root}/rayclusters")}
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
        active = status["activeServiceStatus"].get("rayClusterName")
        if self.incremental and active not in (None, name):
            status["activeServiceStatus"]["trafficRoutedPercent"] = 100
            status["pendingServiceStatus"]["trafficRoutedPercent"] = 0
            return
        applications = {"applicationStatuses": {"diffusion-serve": {"status": "RUNNING"}}}
        status["activeServiceStatus"] = {"rayClusterName": name} | applications
        status["pendingServiceStatus"] = {}
        status["conditions"] = [
            {"type": "Ready", "status": "True", "reason": "NonZeroServeEndpoints", "message": "up"}
        ]
        namespace = path.split("/")[5]
        if self._sent.get(name) != service["spec"]["serveConfigV2"]:
            self._sent[name] = service["spec"]["serveConfigV2"]
            self.drawn += 1
            self.store[f"/api/v1/namespaces/{namespace}/events/e{self.drawn}"] = {
                "metadata": {"name": f"e{self.drawn}"}, "type": "Normal", "count": 1,
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
        self.save(
            f"{root}/rayclusters/{name}",
            {"metadata": {"name": name, "annotations": {HASH: goal}}, "status": {}},
        )
        spec = service["spec"]["rayClusterConfig"]
        self._make_pod(root, name, "head", "head", spec["headGroupSpec"])
        for group in spec.get("workerGroupSpecs") or ():
            for _ in range(group["minReplicas"]):
                self._make_pod(root, name, "worker", group["groupName"], group)

    def _make_pod(self, root: str, cluster: str, kind: str, group: str, template: Object) -> None:
        self.drawn += 1
        name = f"{cluster}-{group}-{self.drawn}"
        namespace = root.rpartition("/")[2]
        labels = {"ray.io/cluster": cluster, "ray.io/node-type": kind, "ray.io/group": group}
        self.save(f"/api/v1/namespaces/{namespace}/pods/{name}", {
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
                    self._tell_scale_up(pod)
                    continue
                taken += _gpus(pod)
                pod["spec"]["nodeName"] = "gpu-1"
                status["conditions"] = [{"type": "PodScheduled", "status": "True"}]
            elif self.kubelet != "none":
                state = {"name": "main", "ready": True, "state": {"running": {}}}
                state |= {"containerID": "containerd://1"} if self.kubelet == "runs" else {}
                status.update(phase="Running", startTime="2026-01-01T00:00:00Z")
                status["containerStatuses"] = [state]

    def _tell_scale_up(self, pod: Object) -> None:
        namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
        if self.scales_up:
            self.store[f"/api/v1/namespaces/{namespace}/events/{name}"] = {
                "metadata": {"name": name}, "type": "Normal", "reason": "TriggeredScaleUp",
                "involvedObject": {"kind": "Pod", "name": name},
            }  # fmt: skip

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
