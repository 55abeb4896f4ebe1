"""The real thing: ``serve run`` on configs/demo.yaml as a process of its own, on free ports."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pytest
import ray
import yaml
from ray import serve
from ray.serve.context import _set_global_client
from ray.util import get_node_ip_address

from serve_app.config.serve_file import WORK_POLICY
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
SERVE = Path(sys.executable).with_name("serve")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Server:
    """A running application."""

    url: str
    ray_address: str
    log: Path
    first_image_s: float
    """From the start of the process to the first finished picture."""


@dataclass(frozen=True)
class ServeProcess:
    """``serve run`` with its Ray cluster, in a process group of its own."""

    process: subprocess.Popen[bytes]
    folder: Path
    log: Path

    @property
    def ray_address(self) -> str:
        """Where another driver finds the cluster: Ray leaves its port in the session's folder."""
        [port] = (self.folder / "ray" / "session_latest").glob("gcs_server_port_*")
        return f"{get_node_ip_address()}:{port.read_text()}"

    def wait_until_ready(self, url: str, path: str = "/ready") -> None:
        """Until a replica can paint, or ``path`` is answered; with the log, if it ends before."""

        def ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            try:
                return httpx.get(f"{url}{path}", timeout=20).status_code == 200
            except httpx.TransportError:
                return False

        wait_until(ready, deadline_s=150, every_s=0.2, what=path)

    def stop(self) -> None:
        """End it as Ctrl-C would, and make sure that nothing of it is left."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        # Ray's processes name their folder on the command line, and nobody else's do.
        subprocess.run(["pkill", "-KILL", "-f", str(self.folder)], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)


def start_serve(
    config: dict[str, object], variables: Mapping[str, str] | None = None
) -> ServeProcess:
    """Run the config on a local Ray cluster that no other can be mistaken for."""
    folder = Path(tempfile.mkdtemp(prefix="ds", dir="/tmp"))  # short: for Ray's sockets
    path, log = folder / "serve.yaml", folder / "serve.log"
    path.write_text(yaml.safe_dump(config))
    environment = os.environ | {
        "RAY_ADDRESS": "local",
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.gateway.proxy:middlewares",
        **(variables or {}),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [SERVE, "run", path],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return ServeProcess(process, folder, log)


def demo_config(port: int) -> dict[str, object]:
    config: dict[str, object] = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    return config


def scaled_demo(
    port: int, replicas: tuple[int, int], actor: dict[str, float], knobs: dict[str, float]
) -> dict[str, Any]:
    """The demo with from as few to as many replicas, by the work that waits, looked at each second.

    ``actor``: what a replica asks Ray for.
    """
    config: dict[str, Any] = demo_config(port)
    [application] = config["applications"]
    [generator] = application["deployments"]
    generator["ray_actor_options"] = actor
    least, most = replicas
    generator["autoscaling_config"] = {
        "min_replicas": least,
        "max_replicas": most,
        "upscale_delay_s": 0,
        "downscale_delay_s": 0,
        "metrics_interval_s": 1,
        "look_back_period_s": 3,
        "policy": {"policy_function": WORK_POLICY, "policy_kwargs": knobs},
    }
    return config


@pytest.fixture(scope="session")
def server(report: Callable[[str], None]) -> Iterator[Server]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    started_at = monotonic()
    running = start_serve(demo_config(port))

    def first_image() -> bool:
        assert running.process.poll() is None, running.log.read_text()
        try:
            body = {"prompt": "a red circle on a blue background", "seed": 1}
            response = httpx.post(f"{url}/v1/images/generations", json=body, timeout=20)
        except httpx.TransportError:
            return False
        return response.status_code == 200

    try:
        try:
            wait_until(first_image, deadline_s=150, every_s=0.2, what="the first picture")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{running.log.read_text()[-5000:]}") from None
        took_s = monotonic() - started_at
        report(f"serve run to the first picture: {took_s:.1f} s")
        yield Server(url, running.ray_address, running.log, took_s)
    finally:
        running.stop()


@contextmanager
def connected(ray_address: str) -> Iterator[None]:
    """This process as a driver of that cluster; Serve keeps no memory of the one before."""
    ray.init(address=ray_address, namespace="serve", log_to_driver=False)
    try:
        yield
    finally:
        _set_global_client(None)
        ray.shutdown()


@pytest.fixture(scope="module")
def generator(server: Server) -> Iterator[Any]:
    """A handle to the running generator, to look into its engine."""
    with connected(server.ray_address):
        yield serve.get_deployment_handle("Generator", "diffusion-serve")
