"""A real Prometheus with the project's configuration that scrapes a test's server."""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from monitoring.rules import rules
from tests.serve_process import ServeProcess, free_port
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "monitoring" / "prometheus.yaml"

SCRAPE_EVERY_S = 1.0


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    url: str

    def get(self, path: str, **params: Any) -> Any:
        """Return an answer of its API; fail with its message on an error."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=params, timeout=120)
        assert answer.status_code == 200, f"{params}: {answer.text}"
        return answer.json()["data"]

    def value(self, query: str) -> float | None:
        """Return the value of the first series, if there is one."""
        result = self.get("query", query=query)["result"]
        return float(result[0]["value"][1]) if result else None


@contextlib.contextmanager
def start_prometheus(url: str, running: ServeProcess) -> Iterator[Prometheus]:
    """Start it with the project's configuration, other addresses and an interval of a second."""
    folder = Path(tempfile.mkdtemp(prefix="dp"))
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules()))
    config = yaml.safe_load(CONFIG.read_text())
    every = f"{SCRAPE_EVERY_S:g}s"
    config["global"] = {"scrape_interval": every, "evaluation_interval": every}
    config["rule_files"] = [str(folder / "rules.yaml")]
    application, ray = config["scrape_configs"]
    application["static_configs"] = [{"targets": [url.removeprefix("http://")]}]
    [discovery] = ray["file_sd_configs"]
    discovery["files"] = [
        str(running.folder / "ray" / Path(name).name) for name in discovery["files"]
    ]
    discovery["refresh_interval"] = "1s"
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return httpx.get(f"http://{address}/-/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(ready, deadline_s=30, every_s=0.1, what="Prometheus")
        prometheus = Prometheus(f"http://{address}")
        # Counts before the first scrape are no increase.
        wait_until(
            lambda: prometheus.value('up{job="diffusion-serve"} == 1'),
            deadline_s=30,
            every_s=0.1,
            what="the first scrape",
        )
        yield prometheus
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(folder)
