"""`GET /metrics` of a served demo: its content, its replicas and its duration."""

import asyncio
import concurrent.futures
import json
import os
import signal
import statistics
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from serve_app.deployments.ray_compat import deployment_details
from serve_app.deployments.scrape import ANSWER_WITHIN_S
from serve_app.gateway.schemas import PARTS
from tests.e2e.conftest import Server
from tests.serve_process import ServeProcess, connected, demo_config, free_port, start_serve
from tests.waiting import wait_until

pytestmark = pytest.mark.serve

SHARE = 0.05
"""Largest share of a client's wait that may be in no part of the request."""

BUSY_S = 0.5
"""Time that a busy machine may take before and after the server."""


@dataclass(frozen=True)
class Scraped:
    """One response, parsed as by Prometheus."""

    families: list[Metric]
    took_s: float

    def values(self, name: str, **labels: str) -> dict[str, float]:
        """Return the values of a metric by replica; ``""`` stands for all replicas together."""
        return {
            sample.labels.get("replica", ""): sample.value
            for family in self.families
            for sample in family.samples
            if sample.name == f"diffusion_serve_{name}" and labels.items() <= sample.labels.items()
        }

    def total(self, name: str, **labels: str) -> float:
        return sum(
            sample.value
            for family in self.families
            for sample in family.samples
            if sample.name == f"diffusion_serve_{name}" and labels.items() <= sample.labels.items()
        )


def scrape(url: str) -> Scraped:
    started_at = perf_counter()
    response = httpx.get(f"{url}/metrics", timeout=20)
    took_s = perf_counter() - started_at
    assert response.status_code == 200, response.text
    return Scraped(list(text_string_to_metric_families(response.text)), took_s)


def generate(url: str, **body: Any) -> tuple[httpx.Response, float]:
    """Return the response and how long its client waited for it."""
    with httpx.Client(base_url=url, timeout=480) as client:
        client.get("/health")  # opening the connection is not the server's time
        started_at = perf_counter()
        response = client.post("/v1/images/generations", json={"prompt": "a red circle"} | body)
        return response, perf_counter() - started_at


def test_an_image_changes_the_metrics(server: Server) -> None:
    before = scrape(server.url)
    response, _ = generate(server.url, size="96x64", num_inference_steps=7)
    assert response.status_code == 200
    after = scrape(server.url)

    def more(name: str, **labels: str) -> float:
        return after.total(name, **labels) - before.total(name, **labels)

    labels = {"key": "anonymous", "priority": "interactive"}
    assert more("requests_total", outcome="completed", **labels) == 1
    assert before.values("requests_total", outcome="generation_failed", **labels)  # at 0
    assert after.values("open_requests", priority="interactive")
    assert more("images_total", size="128") == 1
    assert more("steps_total", size="128") == 7
    assert more("pixels_total") == 96 * 64
    for part in PARTS:
        assert more("request_part_seconds_count", part=part) == 1
    # The gateway keeps the last status while Serve's controller is too busy to answer.
    wait_until(
        lambda: scrape(server.url).values("replicas", state="running") == {"": 1.0},
        deadline_s=60,
        what="the running replica in the metrics",
    )
    assert after.values("target_replicas") == {"": 1.0}
    [engine], [gateway] = after.values("engine_info"), after.values("gateway_info")
    assert engine != gateway
    for deployment in ("Generator", "Gateway"):
        of_it = {"deployment": deployment}
        assert after.total("scraped_replicas", answer="answered", **of_it) == 1
        assert after.total("scraped_replicas", answer="silent", **of_it) == 0


def test_exemplars_in_openmetrics_name_a_request(server: Server) -> None:
    httpx.post(
        f"{server.url}/v1/images/generations",
        json={"prompt": "x", "num_inference_steps": 2},
        headers={"x-request-id": "find-me"},
        timeout=240,
    )
    response = httpx.get(
        f"{server.url}/metrics", headers={"accept": "application/openmetrics-text"}, timeout=20
    )
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    exemplars = {
        (family.name, sample.exemplar.labels["request_id"])
        for family in openmetrics_families(response.text)
        for sample in family.samples
        if sample.exemplar
    }
    assert ("diffusion_serve_request_seconds", "find-me") in exemplars
    assert ("diffusion_serve_request_part_seconds", "find-me") in exemplars


def test_the_parts_of_a_request_add_up_to_what_its_client_waits(
    server: Server, report: Callable[[str], None]
) -> None:
    """Four clients at a time mix sizes, steps and formats."""
    bodies = [
        {
            "size": ("64x64", "128x64", "128x128", "96x96")[index % 4],
            "num_inference_steps": (20, 30, 40)[index % 3],
            "output_format": ("png", "jpeg", "webp")[index % 3],
            "n": 2 if index % 5 == 0 else 1,
            "seed": index,
        }
        for index in range(24)
    ]
    with concurrent.futures.ThreadPoolExecutor(4) as clients:
        list(clients.map(lambda seed: generate(server.url, seed=seed), range(4)))  # connections
        answers = list(clients.map(lambda body: generate(server.url, **body), bodies))
    off = []
    for response, waited_s in answers:
        assert response.status_code == 200, response.text
        timings = response.json()["timings"]
        parts_s = sum(timings[f"{part}_s"] for part in PARTS)
        assert parts_s == pytest.approx(timings["total_s"], rel=1e-6)
        off.append(abs(waited_s - parts_s) / waited_s)
        # Time that a busy machine takes before and after the server is in no part.
        assert abs(waited_s - parts_s) <= max(SHARE * waited_s, BUSY_S)
    waited = sorted(waited_s for _, waited_s in answers)
    report(
        f"parts against what clients waited ({waited[0]:.2f} to {waited[-1]:.2f} s): "
        f"{statistics.median(off):.1%} off, {max(off):.1%} at most, of {len(off)} requests"
    )
    assert statistics.median(off) <= SHARE


def test_a_scrape_is_answered_while_images_are_generated(
    server: Server, report: Callable[[str], None]
) -> None:
    idle = statistics.median(scrape(server.url).took_s for _ in range(10))
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            generate(server.url, num_inference_steps=20)

    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        working = [clients.submit(load) for _ in range(8)]
        try:
            wait_until(lambda: scrape(server.url).total("engine_requests") >= 4)
            seen = [scrape(server.url) for _ in range(20)]
        finally:
            stop.set()
        for work in working:
            work.result()
    took_s = sorted(one.took_s for one in seen)
    report(
        f"a scrape takes {1000 * idle:.0f} ms, under load "
        f"{1000 * statistics.median(took_s):.0f} ms and {1000 * took_s[-1]:.0f} ms at most"
    )
    assert all(one.total("scraped_replicas", answer="silent") == 0 for one in seen)
    assert any(one.total("engine_requests", state="running") for one in seen)


@pytest.fixture(scope="module")
def status() -> Iterator[tuple[ServeProcess, str]]:
    """Two gateways, and no replica of the generator before the first request."""
    config: dict[str, Any] = demo_config(port := free_port())
    [application] = config["applications"]
    [generator] = application["deployments"]
    generator["autoscaling_config"] = {
        "min_replicas": 0,
        "initial_replicas": 0,
        "max_replicas": 2,
        "target_ongoing_requests": 1,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 600,
        "metrics_interval_s": 0.2,
        "look_back_period_s": 0.4,
    }
    generator["ray_actor_options"] = {"num_gpus": 0, "num_cpus": 0.1}
    gateway = {"name": "Gateway", "num_replicas": 2, "ray_actor_options": {"num_cpus": 0.1}}
    application["deployments"].append(gateway)
    application["logging_config"] = {"encoding": "JSON"}
    running = start_serve(config)
    url = f"http://127.0.0.1:{port}"

    try:
        running.wait_until_ready(url, "/health")
        yield running, url
    finally:
        running.stop()


def test_metrics_cover_none_or_many_replicas_and_count_the_silent_ones(
    status: tuple[ServeProcess, str],
) -> None:
    running, url = status

    def gateways() -> int:
        return len(scrape(url).values("gateway_info"))

    wait_until(lambda: gateways() == 2, deadline_s=60, what="both gateways")
    none = scrape(url)
    assert none.values("engine_info") == {}
    assert none.values("replicas", state="running") == {"": 0.0}
    assert none.total("scraped_replicas", deployment="Generator") == 0
    assert none.total("scraped_replicas", deployment="Gateway", answer="answered") == 2

    stop = threading.Event()
    done: list[int] = []

    def load() -> None:
        while not stop.is_set():
            done.append(generate(url, num_inference_steps=20)[0].status_code)

    with concurrent.futures.ThreadPoolExecutor(6) as clients:
        working = [clients.submit(load) for _ in range(6)]
        try:
            wait_until(
                lambda: len(scrape(url).values("engine_info")) == 2,
                deadline_s=240,
                every_s=0.5,
                what="two replicas of the generator",
            )
        finally:
            stop.set()
        for work in working:
            work.result()
    many = scrape(url)
    counted = many.total("requests_total", outcome="completed")
    assert counted == done.count(200)  # of both gateways, whichever one answers
    for _ in range(6):
        again = scrape(url)
        assert again.total("requests_total", outcome="completed") == counted
        assert again.values("gateway_info").keys() == many.values("gateway_info").keys()
    assert len(many.values("backlog_seconds", priority="interactive")) == 2

    # A replica that hangs delays the response a little; the others are in it.
    first, _ = _processes_of_generators(running)
    os.kill(first, signal.SIGSTOP)
    try:
        hanging = scrape(url)
    finally:
        os.kill(first, signal.SIGCONT)
    assert ANSWER_WITHIN_S <= hanging.took_s < 2 * ANSWER_WITHIN_S + 2
    assert len(hanging.values("engine_info")) == 1
    assert hanging.total("scraped_replicas", deployment="Generator", answer="answered") == 1
    assert hanging.total("scraped_replicas", deployment="Generator", answer="silent") == 1
    assert hanging.total("requests_total", outcome="completed") == counted

    # A replica dies during the scrape.
    with concurrent.futures.ThreadPoolExecutor(1) as clients:
        os.kill(first, signal.SIGSTOP)
        dying = clients.submit(scrape, url)
        threading.Event().wait(0.5)
        os.kill(first, signal.SIGKILL)
        seen = dying.result()
    assert len(seen.values("engine_info")) == 1
    assert seen.total("scraped_replicas", deployment="Generator", answer="silent") == 1
    wait_until(
        lambda: len(scrape(url).values("engine_info")) == 2, deadline_s=240, what="a new replica"
    )


def test_one_setting_turns_our_log_lines_and_serves_into_json(
    status: tuple[ServeProcess, str],
) -> None:
    running, url = status
    httpx.post(
        f"{url}/v1/images/generations",
        json={"prompt": "nobody reads this", "seed": 5, "num_inference_steps": 4},
        headers={"x-request-id": "find-me"},
        timeout=240,
    )

    folder = running.folder / "ray" / "session_latest" / "logs" / "serve"

    def lines() -> list[dict[str, Any]]:
        texts = [path.read_text() for path in folder.glob("replica_*Gateway_*.log")]
        assert not any("nobody reads this" in text for text in texts)
        found = [json.loads(line) for text in texts for line in text.splitlines()]
        return [line for line in found if line.get("request_id") == "find-me"]

    def of_the_gateway() -> dict[str, Any] | None:
        return next((line for line in lines() if line.get("outcome")), None)

    ours = wait_until(of_the_gateway, what="the line of the request")
    assert (ours["outcome"], ours["key"], ours["steps"], ours["seed"]) == (
        "completed",
        "anonymous",
        4,
        5,
    )
    parts_s = sum(ours[f"{part}_s"] for part in PARTS)
    assert parts_s == pytest.approx(ours["total_s"], abs=0.001)
    replica, _, number = ours["engine_request"].partition("/")
    assert len(list(folder.glob(f"replica_*Generator_{replica}.log"))) == 1
    assert int(number) >= 1
    assert any("outcome" not in line for line in lines())  # Serve's own line of the same request


def _processes_of_generators(running: ServeProcess) -> list[int]:
    with connected(running.ray_address):
        details = asyncio.run(deployment_details("diffusion-serve", "Generator"))
        return [replica.pid for replica in details.replicas if replica.pid is not None]
