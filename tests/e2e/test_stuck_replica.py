"""A replica that hangs in a call, on a real server: its requests move, and it is replaced."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import ray

from tests.e2e.hanging import HANG_FILE
from tests.e2e.test_metrics import scrape
from tests.serve_process import ROOT, connected, demo_config, free_port, start_serve
from tests.waiting import wait_until

pytestmark = pytest.mark.serve

REQUESTS = 6


def _replicas() -> set[str]:
    """Return the names of the generator's replicas, starting ones included."""
    names = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    return {name for name in names if "#Generator#" in name}


def _stream(url: str, seed: int) -> list[str]:
    """Generate an image; return its events, with the data of the last one."""
    body = {"prompt": "a red cross on cyan", "seed": seed, "num_inference_steps": 60}
    more = {"size": "64x64", "stream": True, "partial_images": 2}
    response = httpx.post(f"{url}/v1/images/generations", json=body | more, timeout=480)
    assert response.status_code == 200, response.text
    return [line for line in response.text.splitlines() if line.startswith("event: ")]


def test_the_requests_of_a_replica_that_hangs_move_and_it_is_replaced(
    tmp_path: Path, report: Callable[[str], None]
) -> None:
    config = demo_config(free_port())
    [application] = config["applications"]
    application["import_path"] = "tests.e2e.hanging:build"
    application["args"]["engine"]["stuck_after_s"] = 1.0
    [generator] = application["deployments"]
    generator |= {"num_replicas": 2, "ray_actor_options": {"num_gpus": 0, "num_cpus": 0}}
    hang = tmp_path / "hang"
    running = start_serve(config, {"PYTHONPATH": str(ROOT), HANG_FILE: str(hang)})
    url = f"http://127.0.0.1:{config['http_options']['port']}"

    def ready() -> float:
        return scrape(url).total("replicas", state="running")

    try:
        running.wait_until_ready(url)
        wait_until(lambda: ready() == 2, deadline_s=90, every_s=0.5, what="two replicas")
        expected = _stream(url, 0)
        assert expected[-1] == "event: image_generation.completed"
        assert len(expected) == 3
        with connected(running.ray_address), ThreadPoolExecutor(REQUESTS) as clients:
            before = _replicas()
            answers = [clients.submit(_stream, url, seed) for seed in range(REQUESTS)]
            hang.touch()
            wait_until(lambda: not hang.exists(), what="a replica to hang")
            hung_at = time.monotonic()
            for answer in answers:
                assert answer.result(timeout=480) == expected
            answered_s = time.monotonic() - hung_at
            wait_until(
                lambda: len(_replicas() - before) == 1, deadline_s=60, what="another replica"
            )
            replaced_s = time.monotonic() - hung_at
            assert len(before - _replicas()) == 1
            wait_until(lambda: ready() == 2, deadline_s=90, every_s=0.5, what="two replicas")
        log = running.log.read_text()
    finally:
        running.stop()
    assert "the engine is stuck: unet (" in log
    assert "has not ended after" in log
    report(
        f"a stuck replica: its requests were answered {answered_s:.1f} s after it hung, its "
        f"successor started after {replaced_s:.1f} s"
    )
