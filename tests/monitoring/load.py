"""A server of the demo that scales, and clients that use it as clients do."""

import concurrent.futures
import itertools
import threading
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import httpx

from tests.serve_process import scaled_demo

PARAMS = {"target_utilization": 0.5, "smoothing_s": 5, "hold_s": 60, "cold_start_s": 5}
"""Scaling parameters that request a second replica for this load within seconds."""

CLIENTS = 3

STEPS = 10

PAUSE_S = 1.0
"""Pause of a client between two requests: the load is less than two replicas can serve."""

TIGHT = 1.25
"""Deadline in multiples of the solo seconds: an idle replica meets it, and others reject it."""

TIGHT_EVERY = 8
"""Turns between two such requests, once one was rejected: the SLO allows one of twenty."""


def demo_of_two(port: int) -> dict[str, Any]:
    """Configure one replica or two, by the waiting work, on shared CPUs."""
    return scaled_demo(port, (1, 2), {"num_gpus": 0, "num_cpus": 0.4}, PARAMS)


def _kinds(solo_s: float, outcomes: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield requests of several sizes, lengths and kinds, in turns.

    ``solo_s``: solo seconds of an image of `STEPS`; ``outcomes``: outcomes so far.
    """
    seeds = itertools.count()
    tight = {"num_inference_steps": STEPS, "deadline_s": TIGHT * solo_s}
    ways: list[dict[str, Any]] = [
        {"num_inference_steps": 20},
        {"num_inference_steps": 40, "size": "128x128"},
        {"num_inference_steps": 30, "stream": True, "partial_images": 2},
        {"num_inference_steps": 30, "n": 2},
        {"num_inference_steps": 20, "size": "96x64"},
        {
            "num_inference_steps": 200,
            "deadline_s": 0.01,
        },  # an invalid deadline: no engine is so fast
        {"num_inference_steps": 40, "hang_up": True},
    ]
    for turn in itertools.count():
        extra = [tight] if turn % TIGHT_EVERY == 0 or "429" not in outcomes else []
        for way in ways[:3] + extra + ways[3:]:
            yield {"prompt": "a red circle", "seed": next(seeds), "deadline_s": 90} | way


def _ask(client: httpx.Client, body: dict[str, Any]) -> str:
    """Send a request; return its outcome. A client that hangs up does so in the first steps."""
    hang_up = body.pop("hang_up", False)
    if not hang_up:
        response = client.post("/v1/images/generations", json=body)
        return str(response.status_code)
    body |= {"stream": True, "progress": True}
    with client.stream("POST", "/v1/images/generations", json=body) as response:
        for _ in response.iter_lines():
            return "hung up"
    return str(response.status_code)


class MixedLoad:
    """Several clients, each with one request after the other; a context manager."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._kinds: Iterator[dict[str, Any]] = iter(())
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(CLIENTS)
        self._clients: list[concurrent.futures.Future[None]] = []
        self.outcomes: Counter[str] = Counter()
        """Number of requests by outcome: a status, or "hung up"."""

    def __enter__(self) -> "MixedLoad":
        self._kinds = _kinds(self._solo_s(), self.outcomes)
        self._clients = [self._pool.submit(self._run) for _ in range(CLIENTS)]
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._pool.shutdown()
        for client in self._clients:
            client.result()

    def _solo_s(self) -> float:
        """Measure the solo seconds by the server's clock."""
        body = {"prompt": "a red circle", "seed": 0, "num_inference_steps": STEPS}
        answer = httpx.post(f"{self._url}/v1/images/generations", json=body, timeout=480)
        timings = answer.raise_for_status().json()["timings"]
        return float(timings["encode_s"] + timings["denoise_s"] + timings["decode_s"])

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=480) as client:
            while not self._over.is_set():
                with self._lock:
                    body = next(self._kinds)
                outcome = _ask(client, body)
                with self._lock:
                    self.outcomes[outcome] += 1
                self._over.wait(PAUSE_S)
