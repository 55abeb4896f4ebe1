"""A Kubernetes API server that is written to: server-side apply, deletion, port forwards."""

import json
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tests.doctor.fake_cluster import TOKEN, FakeApi, Object
from tests.doctor.rehearsal.fake_pod_port import forward_port
from tests.fakes.http_server import QuietHandler

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


class WritableApi(FakeApi):
    """The API server; a subclass answers for its pods."""

    def __init__(self) -> None:
        super().__init__()
        self.port_refuses = False
        self.port_forwards = True
        """True if the API server opens port forwards."""
        self.forbidden: set[tuple[str, str]] = set()
        """Methods and resources."""
        self.away = False
        """True while the API server is being replaced."""
        self.writes: list[tuple[str, str]] = []
        """Methods and paths."""
        self.dry_runs: list[str] = []
        self.deleted: list[str] = []
        self.store: dict[str, Object] = {}
        """Objects by path."""
        self.drawn = 0
        self.handler = _handler(self)

    def answer_of_port(self, authorization: str, pod: str, refused: int) -> tuple[int, Object]:
        """Answer for the port of ``pod``; with ``refused`` if it cannot be reached."""
        raise NotImplementedError

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
            return self.answer_of_port(
                headers.get("X-Key", ""),
                parts[parts.index("proxy") - 1].partition(":")[0],
                refused=503,
            )
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
            return 201, self.save(path, content)
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
                one for one in self.below(path)
                if not wanted[0] or one["metadata"].get("labels", {}).get(wanted[0]) == wanted[2]
            ]}  # fmt: skip
        if len(rest) > 1:
            return 404, {"message": "not found"}
        return super().answer(path, f"Bearer {TOKEN}")

    def below(self, path: str) -> list[Object]:
        return [
            one for key, one in self.store.items()
            if key.startswith(path + "/") and "/" not in key[len(path) + 1 :]
        ]  # fmt: skip

    def save(self, path: str, content: Object) -> Object:
        old = self.store.get(path, {})
        self.drawn += 1
        metadata = {"uid": f"uid-{self.drawn}", "generation": 1} | content["metadata"]
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
        return 200, self.save(path, content)

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


def _handler(api: WritableApi) -> type[BaseHTTPRequestHandler]:
    class Handler(QuietHandler):
        def _any(self) -> None:
            if self.headers.get("Upgrade", "").lower() == "websocket":
                pod = self.path.partition("/pods/")[2].partition("/")[0]
                forward_port(
                    self,
                    not api.port_forwards or api.port_refuses,
                    lambda key: api.answer_of_port(key, pod, 200),
                )
                return
            self.respond_json(*api.handle(self.command, self.path, self.headers, self.body()))

        do_GET = do_POST = do_PATCH = do_DELETE = _any  # noqa: N815  # http.server's names

    return Handler
