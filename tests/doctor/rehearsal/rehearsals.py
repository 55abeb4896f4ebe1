"""A service to rehearse, and the record of one rehearsal."""

from collections.abc import Callable
from pathlib import Path

from serve_app.config.environment import KEYS_PATH_VARIABLE
from serve_app.doctor.kube_write import WritableCluster
from serve_app.doctor.rehearsal.manifest import prepare
from serve_app.doctor.rehearsal.run import rehearse
from serve_app.doctor.report import Finding
from tests.doctor.fake_cluster import Object
from tests.doctor.rehearsal.fake_operator import OperatorApi
from tests.fakes.clock import ManualClock

STEPS = (
    "preflight", "apply", "RayCluster", "pods", "ready", "image", "Serve config", "upgrade",
    "roll back", "delete",
)  # fmt: skip
SERVE_CONFIG = """
applications:
  - name: diffusion-serve
    import_path: serve_app.app:build
    deployments:
      - name: Generator
"""


def service(**spec: object) -> Object:
    """Make a RayService of one head and one GPU worker, with API keys in a Secret."""
    worker = {
        "containers": [
            {
                "name": "w",
                "resources": {"limits": {"nvidia.com/gpu": 1}},
                "env": [{"name": KEYS_PATH_VARIABLE, "value": "/keys/keys.yaml"}],
                "volumeMounts": [{"name": "keys", "mountPath": "/keys"}],
            }
        ],
        "volumes": [{"name": "keys", "secret": {"secretName": "api-keys"}}],
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "sdxl", "namespace": "images"},
        "spec": {
            "serveConfigV2": SERVE_CONFIG,
            "rayClusterConfig": {
                "headGroupSpec": {"template": {"spec": {"containers": [{"name": "h"}]}}},
                "workerGroupSpecs": [
                    {"groupName": "gpu", "minReplicas": 1, "template": {"spec": worker}}
                ],
            },
        }
        | spec,
    }


class Run:
    """One rehearsal: its findings by check, its lines, and what it left."""

    def __init__(
        self, api: OperatorApi, folder: Path, *overlay: Object, at: Callable[[float], None]
    ) -> None:
        self.lines: list[str] = []
        with WritableCluster(None, api.kubeconfig(folder)) as cluster:
            manifest = prepare(overlay or (service(),), "overlay", cluster.lives_in_namespace)
            clock = ManualClock(api.advance, at)
            self.all = rehearse(cluster, manifest, self.lines.append, clock)
        self.findings: dict[str, Finding] = {one.check: one for one in self.all}
        assert len(self.findings) == len(self.all)
        self.took_s = clock.now()
        self.name = manifest.name

    def failed(self) -> list[str]:
        return [one.check for one in self.all if one.outcome == "failed"]

    def outcomes(self) -> set[str]:
        return {one.outcome for one in self.all}
