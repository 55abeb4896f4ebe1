"""The compared servers, each as a process of its own with one thread of torch."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.serve_process import (
    ServeProcess,
    demo_config,
    free_port,
    new_folder,
    start_program,
    start_serve,
)

OURS = "ours"
OURS_FIFO = "ours-fifo"
PEERS = ("lock", "batch")
NAMES = (*PEERS, OURS, OURS_FIFO)

EQUAL = {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
"""Environment of all servers: one thread of torch, and the same priority on a shared machine.

Ray sets the former itself for a replica with ``num_cpus: 1``. It gives its workers a niceness of
15, so that any other program of the machine would slow ours only.
"""


@dataclass(frozen=True)
class Calls:
    """Denoiser calls of the engine since its start."""

    number: float
    images: float
    """Images in all calls together."""


@dataclass(frozen=True)
class Server:
    """A server that runs until `stop`."""

    name: str
    url: str
    process: ServeProcess

    @classmethod
    def start(cls, name: str, overrides: Sequence[str] = ()) -> "Server":
        """Start a server by its name, without waiting for it.

        ``overrides`` change the config of ours: ``engine.KEY=VALUE``, with the value as YAML.
        """
        port = free_port()
        if name in PEERS:
            app = f"tests.benchmarks.peers.{name}:app"
            command = [sys.executable, "-m", "uvicorn", app, "--port", str(port)]
            process = start_program(
                [*command, "--log-level", "warning"], new_folder(), EQUAL, cwd=None
            )
        else:
            fifo = ["engine.scheduling=fifo"] if name == OURS_FIFO else []
            process = start_serve(overridden(demo_config(port), [*fifo, *overrides]), EQUAL)
        return cls(name, f"http://127.0.0.1:{port}", process)

    @property
    def is_ours(self) -> bool:
        return self.name not in PEERS

    def wait_until_ready(self) -> None:
        self.process.wait_until_ready(self.url, "/ready" if self.is_ours else "/openapi.json")

    def stop(self) -> None:
        self.process.stop()

    def cpu_s(self) -> dict[int, float]:
        """Return the CPU time of each process of the server so far, in seconds, by its id."""
        found = {}
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.process.pid:
                    times = process.cpu_times()
                    found[process.pid] = times.user + times.system
            except (psutil.Error, ProcessLookupError):  # it has ended
                continue
        return found

    def calls(self) -> Calls | None:
        """Return the calls so far; None for a peer, which does not report any."""
        if not self.is_ours:
            return None
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        values = {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            if family.name == "diffusion_serve_batch_size"
            for sample in family.samples
        }
        prefix = "diffusion_serve_batch_size"
        return Calls(values[f"{prefix}_count"], values[f"{prefix}_sum"])


def overridden(config: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set values in the arguments of the config's application, such as ``engine.scheduling=fifo``.

    Raises:
        ValueError: An override has no value.
    """
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r} has no value: write engine.KEY=VALUE.")
        *sections, key = path.split(".")
        section = config["applications"][0]["args"]
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = yaml.safe_load(value)
    return config
