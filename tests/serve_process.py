"""Ray Serve as a process of its own, with a Ray cluster of its own, on free loopback ports."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import ray
import yaml
from ray.serve.context import _set_global_client
from ray.util import get_node_ip_address

from serve_app.config.serve_file import WORK_POLICY
from tests.waiting import wait_until

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def free_port() -> int:
    [port] = free_ports(1)
    return port


def free_ports(number: int) -> list[int]:
    """Return different ports: all of them stay bound until the last one is found."""
    with contextlib.ExitStack() as probes:
        found = [probes.enter_context(socket.socket()) for _ in range(number)]
        for probe in found:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in found]


def new_folder() -> Path:
    """Create a folder with a short path: Ray's sockets, below it, have at most 107 characters."""
    return Path(tempfile.mkdtemp(prefix="ds", dir="/tmp"))


def kill_session(leader: int) -> None:
    """Kill every process of the session whose first process has, or had, this id."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(int(entry.name)) == leader:
                os.kill(int(entry.name), signal.SIGKILL)


@dataclass(frozen=True)
class RayProcess:
    """A program that started a Ray cluster, in a session of processes of its own."""

    process: subprocess.Popen[bytes]
    folder: Path
    log: Path

    @classmethod
    def start(
        cls,
        command: list[str | Path],
        folder: Path,
        variables: Mapping[str, str],
        cwd: Path | None = ROOT,
    ) -> "RayProcess":
        """Start the command; its output goes into a log file in ``folder``."""
        log = folder / "output.log"
        own = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **variables}
        environment = {name: os.environ[name] for name in os.environ if name != "RAY_ADDRESS"}
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=environment | own,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        return cls(process, folder, log)

    def check_running(self) -> None:
        """Fail the test, with the log, if the process has ended."""
        assert self.process.poll() is None, self.log.read_text()

    def stop(self) -> None:
        """End the process and every process of its session, and delete the folder.

        Ray's own processes can outlive the one that started them.
        """
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        kill_session(self.process.pid)
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class ServeProcess(RayProcess):
    """A program that runs Serve applications on its own Ray cluster."""

    @property
    def ray_address(self) -> str:
        """Address of the cluster for other drivers; Ray keeps its port in the session's folder."""
        [port] = (self.folder / "ray" / "session_latest").glob("gcs_server_port_*")
        return f"{get_node_ip_address()}:{port.read_text()}"

    def wait_until_ready(self, url: str, path: str = "/ready") -> None:
        """Wait until ``path`` returns 200; fail with the log if the process ends before."""

        def ready() -> bool:
            self.check_running()
            try:
                return httpx.get(f"{url}{path}", timeout=20).status_code == 200
            except httpx.TransportError:
                return False

        wait_until(ready, deadline_s=150, every_s=0.2, what=path)


def start_program(
    command: list[str | Path],
    folder: Path,
    variables: Mapping[str, str] | None = None,
    cwd: Path | None = ROOT,
) -> ServeProcess:
    """Start a program that runs Serve on a local Ray cluster in ``folder``."""
    isolated = {"RAY_ADDRESS": "local", "RAY_TMPDIR": str(folder)}
    return ServeProcess.start(command, folder, isolated | dict(variables or {}), cwd)


def start_serve(
    config: dict[str, object], variables: Mapping[str, str] | None = None
) -> ServeProcess:
    """Start ``serve run`` with this config."""
    folder = new_folder()
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    callback = "serve_app.gateway.proxy:middlewares"
    ours = {"RAY_DEDUP_LOGS": "0", "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": callback}
    return start_program([BIN / "serve", "run", path], folder, ours | dict(variables or {}))


@contextlib.contextmanager
def serving_config(
    config: dict[str, Any], variables: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Run Serve with this config until the block ends; yield the URL of its first application."""
    running = start_serve(config, variables)
    options, prefix = config["http_options"], config["applications"][0].get("route_prefix", "/")
    url = f"http://{options['host']}:{options['port']}{prefix.rstrip('/')}"
    try:
        running.wait_until_ready(url)
        yield url
    finally:
        running.stop()


def demo_config(port: int) -> dict[str, Any]:
    """Return the shipped config of the demo, on this port of the loopback interface."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    return config


def scaled_demo(
    port: int, replicas: tuple[int, int], actor: dict[str, float], scaling: dict[str, float]
) -> dict[str, Any]:
    """Return the demo's config with a (least, most) number of replicas and the project's policy.

    The policy decides once a second. ``actor`` is the ``ray_actor_options`` of a replica, and
    ``scaling`` the policy's parameters.
    """
    config = demo_config(port)
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
        "policy": {"policy_function": WORK_POLICY, "policy_kwargs": scaling},
    }
    return config


@contextlib.contextmanager
def connected(ray_address: str) -> Iterator[None]:
    """Make this process a driver of that cluster, without Serve's client of an earlier one."""
    ray.init(address=ray_address, namespace="serve", log_to_driver=False)
    try:
        yield
    finally:
        _set_global_client(None)
        ray.shutdown()
