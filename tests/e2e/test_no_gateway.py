"""Requests while no gateway replica can be placed."""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.gateway.conftest import error_of
from tests.serve_process import demo_config, free_port, serving_config, start_serve
from tests.waiting import wait_until

pytestmark = pytest.mark.serve

HOLD_S = 1.0
DEADLINE_S = 400.0
LONG = {"prompt": "a red circle", "size": "128x128", "num_inference_steps": 150, "seed": 1}


def config(port: int, cpus: float) -> dict[str, object]:
    content = demo_config(port)
    [application] = content["applications"]
    application["args"]["gateway"] = {"max_hold_s": HOLD_S}
    engine = application["args"].setdefault("engine", {})
    engine.setdefault("limits", {}).update(max_steps=300, max_deadline_s=DEADLINE_S)
    engine["max_backlog_s"] = 600.0  # a slow machine predicts a long time for two of them
    gateway = {"name": "Gateway", "ray_actor_options": {"num_cpus": cpus}}
    application["deployments"] = [*application.get("deployments", []), gateway]
    return content


def test_a_request_is_answered_with_a_503_while_no_gateway_can_be_placed() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    running = start_serve(config(port, cpus=10_000))
    try:

        def answer() -> httpx.Response | None:
            running.check_running()
            try:
                found = httpx.post(f"{url}/v1/images/generations", json=LONG, timeout=40)
            except httpx.ConnectError:
                return None
            return None if found.status_code == 404 else found  # no route yet

        response = wait_until(answer, deadline_s=150, every_s=0.2, what="an answer")
        for path in ("/v1/models", "/ready", "/"):
            began_at = time.monotonic()
            response = httpx.get(url + path, timeout=40)
            assert HOLD_S - 0.5 <= time.monotonic() - began_at < HOLD_S + 10
            error = error_of(response, 503)
            assert error["code"] == "unavailable"
            assert int(response.headers["retry-after"]) >= 1
            assert response.headers["x-request-id"]
    finally:
        running.stop()


def test_generations_longer_than_the_limit_are_not_cut() -> None:
    with serving_config(config(free_port(), cpus=0.5)) as url, ThreadPoolExecutor(2) as pool:

        def generate(stream: bool) -> tuple[float, httpx.Response]:
            began_at = time.monotonic()
            body = LONG | {"stream": stream, "deadline_s": DEADLINE_S}
            answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=DEADLINE_S)
            return time.monotonic() - began_at, answer

        for took_s, answer in pool.map(generate, (False, True)):
            assert answer.status_code == 200, answer.text
            assert took_s > 2 * HOLD_S
            assert "error" not in answer.text[:500]
            assert "b64_json" in answer.text
