"""A Ray cluster on this machine with fake GPU nodes, which Ray's own autoscaler starts and ends.

A replica that fits on no node makes the autoscaler start another raylet, which claims to have a
GPU. It ends a raylet without a replica. Only the GPUs are not real.
"""

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import httpx
from ray.util import get_node_ip_address

from serve_app.config.deployment_names import GENERATOR
from tests.serve_process import BIN, RayProcess, free_ports, new_folder, scaled_demo
from tests.waiting import wait_until

HEAD_NODE_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
"""ID of the head; Ray's FakeMultiNodeProvider counts its nodes from here."""

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"


GPU_NODES = {
    # As in cluster/components/scale-to-zero: a gateway would keep the node.
    "gpu": {"ray.io/accelerator-type": "L4", "diffusion-serve/gateway": "no"},
}
"""Labels of the nodes of each group, where a test needs one group only."""


def autoscaling_config(
    gcs_address: str,
    nodes: int,
    idle_minutes: float,
    cpus: int,
    groups: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    """Return the configuration of Ray's autoscaler, which requires every key."""
    kinds = {
        name: {
            "resources": {"CPU": 4, "GPU": 1, "object_store_memory": 100 * 2**20},
            "labels": dict(labels),
            "node_config": {},
            "min_workers": 0,
            "max_workers": nodes,
        }
        for name, labels in groups.items()
    }
    return {
        "cluster_name": "fake",
        "max_workers": nodes,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_minutes,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "gcs_address": gcs_address,
            "head_node_id": HEAD_NODE_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "use_internal_ips": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": cpus}, "node_config": {}, "max_workers": 0},
            **kinds,
        },
        "docker": {},
        "auth": {},
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    }


class Replicas(NamedTuple):
    """The replicas of a deployment at one moment."""

    waiting: int
    """Replicas that wait for a node with a free GPU."""
    starting: int
    """Replicas that start on a node."""
    running: int
    """Replicas that can generate."""
    target: int
    """Target number of replicas of Serve."""


@dataclass(frozen=True)
class Snapshot:
    """The cluster and the generators at one moment."""

    nodes: int
    """Number of nodes with a (fake) GPU."""
    generators: Mapping[str, Replicas]
    """The replicas of each generator, by the name of its deployment."""
    status: str
    """Status of the application."""

    @property
    def running(self) -> int:
        """Replicas of all generators that can generate."""
        return sum(one.running for one in self.generators.values())

    @property
    def target(self) -> int:
        """Target number of replicas of all generators."""
        return sum(one.target for one in self.generators.values())


@dataclass(frozen=True)
class Cluster:
    """A head node with room for the gateway, and no GPU node until a replica needs one."""

    head: RayProcess
    dashboard: str
    """URL of Ray's REST API, through which applications are deployed."""
    metrics_port: int
    """Port of the head's metrics."""

    def deploy(self, config: dict[str, Any]) -> None:
        """Deploy through REST, as ``serve deploy`` and KubeRay do."""
        answer = httpx.put(f"{self.dashboard}/api/serve/applications/", json=config, timeout=240)
        assert answer.status_code == 200, answer.text

    def snapshot(self) -> Snapshot:
        """Read the current state from Serve's and Ray's REST APIs."""
        serve = self._get("/api/serve/applications/")["applications"].get("diffusion-serve", {})
        nodes = self._get("/nodes?view=summary")["data"]["summary"]
        return Snapshot(
            nodes=sum(
                node["raylet"]["state"] == "ALIVE"
                and node["raylet"].get("resourcesTotal", {}).get("GPU", 0) > 0
                for node in nodes
            ),
            generators={
                name: _replicas(deployment)
                for name, deployment in serve.get("deployments", {}).items()
                if name.startswith(GENERATOR)
            },
            status=serve.get("status", "NONE"),
        )

    def labels_below(self, deployment: str) -> list[dict[str, str]]:
        """Return the labels of the node of each of the deployment's replicas."""
        serve = self._get("/api/serve/applications/")["applications"]["diffusion-serve"]
        nodes = self._get("/api/v0/nodes")["data"]["result"]["result"]
        labels = {node["node_id"]: node["labels"] for node in nodes}
        replicas = serve["deployments"][deployment]["replicas"]
        return [labels[replica["node_id"]] for replica in replicas]

    def _get(self, path: str) -> Any:
        answer = httpx.get(f"{self.dashboard}{path}", timeout=20)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def metrics(self) -> str:
        """Return the metrics of the processes on the head, Serve's controller among them."""
        return httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=20).text

    def logs(self, pattern: str) -> str:
        """Return the log files of Ray's processes that match the pattern."""
        folder = self.head.folder / "ray" / "session_latest" / "logs"
        return "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob(pattern)))


def _replicas(deployment: Mapping[str, Any]) -> Replicas:
    """Count the replicas of a deployment as Serve's REST API describes it."""
    states = Counter(
        "WAITING" if one["state"] == "STARTING" and one.get("node_id") is None else one["state"]
        for one in deployment.get("replicas", [])
    )
    return Replicas(
        states["WAITING"],
        states["STARTING"],
        states["RUNNING"],
        deployment.get("target_num_replicas") or 0,
    )


@contextlib.contextmanager
def start_cluster(
    nodes: int,
    idle_minutes: float = 0.2,
    cpus: int = 1,
    groups: Mapping[str, Mapping[str, str]] = GPU_NODES,
) -> Iterator[Cluster]:
    """Start a cluster of at most ``nodes`` nodes, each with one GPU and four CPUs.

    A node ends after ``idle_minutes`` without work. ``cpus`` is the number of CPUs of the head.
    ``groups`` are the labels of the nodes of each group.
    """
    folder = new_folder()
    gcs, dashboard, agent, agent_grpc, client, metrics, runtime_env = free_ports(7)
    address = f"{get_node_ip_address()}:{gcs}"
    config = folder / "autoscaling.json"
    config.write_text(json.dumps(autoscaling_config(address, nodes, idle_minutes, cpus, groups)))
    variables = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE_ID,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    arguments = {
        "autoscaling-config": config,
        "temp-dir": folder / "ray",
        "port": gcs,
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "dashboard-agent-grpc-port": agent_grpc,
        "ray-client-server-port": client,
        "metrics-export-port": metrics,
        "runtime-env-agent-port": runtime_env,
        "num-cpus": cpus,
        "num-gpus": 0,
        "object-store-memory": 100 * 2**20,
    }
    command: list[str | Path] = [BIN / "ray", "start", "--head", "--block"]
    options = [f"--{name}={value}" for name, value in arguments.items()]
    head = RayProcess.start([*command, "--include-dashboard=true", *options], folder, variables)
    cluster = Cluster(head, f"http://127.0.0.1:{dashboard}", metrics)

    def answers() -> bool:
        head.check_running()
        try:
            cluster.snapshot()
        except httpx.TransportError:
            return False
        return True

    try:
        wait_until(answers, deadline_s=90, every_s=0.2, what="Ray's dashboard")
        yield cluster
    finally:
        head.stop()


def scaling_config(port: int, scaling: dict[str, float]) -> dict[str, Any]:
    """Return the demo's config with 0 to 2 replicas, one GPU each, and the project's policy."""
    config = scaled_demo(port, (0, 2), {"num_gpus": 1, "num_cpus": 1}, scaling)
    # All nodes have the address of this machine, where one proxy takes the port.
    config["proxy_location"] = "HeadOnly"
    [application] = config["applications"]
    application["args"]["model"]["device"] = "cpu"
    return config


class Watch:
    """A thread that takes snapshots of a cluster; a context manager."""

    def __init__(self, cluster: Cluster, every_s: float = 0.5) -> None:
        self._cluster = cluster
        self._every_s = every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")
        self.snapshots: list[tuple[float, Snapshot]] = []
        """Pairs of `monotonic` time and snapshot, oldest first."""
        self.failure: BaseException | None = None

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def now(self) -> Snapshot:
        """The latest snapshot."""
        if self.failure is not None:
            raise self.failure
        return self.snapshots[-1][1]

    def wait(self, probe: Callable[[Snapshot], bool], deadline_s: float, what: str) -> float:
        """Return the `monotonic` time of the first snapshot from now on that ``probe`` accepts."""
        begun = len(self.snapshots)

        def found() -> float | None:
            if self.failure is not None:
                raise self.failure
            return next((at for at, seen in self.snapshots[begun:] if probe(seen)), None)

        return (
            wait_until(found, deadline_s, every_s=0.1, what=f"{what}; {self.snapshots[-1:]}") or 0.0
        )

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                seen = self._cluster.snapshot()
                self.snapshots.append((monotonic(), seen))
                self._over.wait(self._every_s)
        except (AssertionError, httpx.HTTPError) as error:
            self.failure = error


@dataclass(frozen=True)
class Answer:
    """Outcome of one request."""

    sent_at: float
    """`monotonic` time."""
    ended_at: float
    rejections: int
    """Responses 429 with a ``Retry-After``."""


def generate(url: str, seed: int, steps: int) -> Answer:
    """Generate an image; after a rejection, retry once, at the returned time.

    Any other outcome fails the test.
    """
    sent_at, rejections = monotonic(), 0
    body = {"prompt": "a red circle on blue", "seed": seed, "num_inference_steps": steps}
    while True:
        response = httpx.post(f"{url}/v1/images/generations", json=body, timeout=180.0)
        if response.status_code != 429:
            assert response.status_code == 200, response.text
            return Answer(sent_at, monotonic(), rejections)
        rejections += 1
        assert rejections == 1, "rejected again, though it came after the time in Retry-After"
        threading.Event().wait(float(response.headers["retry-after"]))
