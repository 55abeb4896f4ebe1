"""Serve's metrics of failing starts beside a running replica, on which the alerts depend."""

import json
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve_process import ROOT, ServeProcess, free_port, start_serve
from tests.waiting import wait_until

pytestmark = pytest.mark.serve

STATUS = "ray_serve_deployment_status"
HEALTHY = "ray_serve_deployment_replica_healthy"
READY = "ray_serve_replica_startup_latency_ms_count"
ENDED = "ray_serve_replica_shutdown_duration_ms_count"


def counted(running: ServeProcess) -> dict[str, float]:
    """Return the deployment's series, each summed over its other labels."""
    found: dict[str, float] = {}
    discovery = running.folder / "ray" / "prom_metrics_service_discovery.json"
    if not discovery.exists():
        return found
    for target in json.loads(discovery.read_text())[0]["targets"]:
        try:
            text = httpx.get(f"http://{target}/metrics", timeout=10).text
        except httpx.TransportError:
            continue  # it is starting
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.labels.get("deployment") == "Lonely":
                    found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def test_failing_starts_beside_a_running_replica_are_counted(tmp_path: Path) -> None:
    application = {
        "name": "lonely",
        "import_path": "tests.monitoring.lonely:build",
        "args": {"place": str(tmp_path / "place")},
    }
    config = {"http_options": {"host": "127.0.0.1", "port": free_port()}}
    running = start_serve(config | {"applications": [application]}, {"PYTHONPATH": str(ROOT)})
    try:
        wait_until(
            lambda: (values := counted(running)).get(ENDED, 0) >= 3 and HEALTHY in values,
            deadline_s=90,
            every_s=1,
            what="replicas that end",
        )
        values = counted(running)
    finally:
        running.stop()
    assert values[READY] == 1
    assert values[HEALTHY] == 1
    assert values[STATUS] in (3, 4), "neither failed nor unhealthy: only the counts show it"
