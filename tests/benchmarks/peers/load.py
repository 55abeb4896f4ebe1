"""Closed loops of clients, and the statistics of their requests.

Each client sends its next request when the last one is answered. A load runs for a settling time
and a window. Clients then send nothing more, and the requests in flight are waited for.

- **Throughput** is counted between two answers while all clients are busy: from the last answer
  of the settling time to the last one of the window. A fixed window would cut batches in two.
  An image counts by the solo time of its kind over the mean of the mix. Otherwise a server that
  puts large images off until the end would gain by it. Images that are alike count 1 each.
- **Latency** is that of every request that was in flight at any time of the window. Those that
  end later see fewer and fewer other requests, so the percentiles of a server that leaves requests
  waiting are lower bounds.
"""

import asyncio
import base64
import io
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.benchmarks.overload import KINDS, PATH, Kind
from tools.demo_model.scenes import COLORS, SHAPES

DEFAULT = Kind(64, 20, 1.0)
"""What a request without a size and steps gets from the demo."""

PAUSE_S = 1.0
"""After an error, so that a client does not send errors in a loop."""


@dataclass(frozen=True)
class Load:
    """A number of clients and what they request."""

    name: str
    clients: int
    kinds: tuple[Kind, ...]
    settle_s: float
    window_s: float

    def scaled(self, seconds: float, steps: float) -> "Load":
        """Return a load of shorter or longer time and requests of fewer or more steps."""
        return replace(
            self,
            kinds=tuple(replace(kind, steps=round(kind.steps * steps)) for kind in self.kinds),
            settle_s=self.settle_s * seconds,
            window_s=self.window_s * seconds,
        )

    def requests(self, seed: int) -> Iterator["Request"]:
        """Yield the requests of this seed: the same ones for every server, in the same order."""
        rng = Random(seed)
        shares = [kind.share for kind in self.kinds]
        for number in itertools.count(1):
            [kind] = rng.choices(self.kinds, shares)
            yield Request(kind, 100_000 * seed + number)


LOADS = (
    Load("1 client, alike", 1, (DEFAULT,), settle_s=2, window_s=22),
    Load("8 clients, alike", 8, (DEFAULT,), settle_s=6, window_s=36),
    Load("16 clients, mixed", 16, tuple(KINDS), settle_s=12, window_s=48),
)


@dataclass(frozen=True)
class Request:
    """A request whose prompt follows from its seed."""

    kind: Kind
    seed: int

    @property
    def body(self) -> dict[str, Any]:
        rng = Random(self.seed)
        color, background = rng.sample(list(COLORS), 2)
        return {
            "prompt": f"a {color} {rng.choice(list(SHAPES))} on a {background} background",
            "seed": self.seed,
            "size": f"{self.kind.side_px}x{self.kind.side_px}",
            "num_inference_steps": self.kind.steps,
        }


@dataclass(frozen=True)
class Answer:
    """The answer to a request, with times since the start of the load."""

    request: Request
    sent_s: float
    ended_s: float
    response: httpx.Response

    @property
    def took_s(self) -> float:
        return self.ended_s - self.sent_s

    def image(self) -> NDArray[np.uint8] | None:
        """Return the image ``[height, width, 3]``; None unless it is as requested."""
        if self.response.status_code != 200:
            return None
        [data] = self.response.json()["data"]
        with Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))) as image:
            side = self.request.kind.side_px
            is_right = image.format == "PNG" and image.size == (side, side)
            return np.asarray(image.convert("RGB")) if is_right else None


def client_of(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    return httpx.AsyncClient(base_url=url, timeout=900, limits=limits)


async def send(client: httpx.AsyncClient, request: Request, started_at: float) -> Answer:
    sent_at = time.perf_counter()
    response = await client.post(PATH, json=request.body)
    ended_at = time.perf_counter()
    return Answer(request, sent_at - started_at, ended_at - started_at, response)


async def run(url: str, load: Load, seed: int) -> list[Answer]:
    """Return all answers, in the order in which they came."""
    requests = load.requests(seed)
    answers: list[Answer] = []
    end_s = load.settle_s + load.window_s
    async with client_of(url) as client:
        started_at = time.perf_counter()

        async def send_until_end() -> None:
            while time.perf_counter() < started_at + end_s:
                answers.append(await send(client, next(requests), started_at))
                if answers[-1].response.status_code != 200:
                    await asyncio.sleep(PAUSE_S)

        await asyncio.gather(*(send_until_end() for _ in range(load.clients)))
    return answers


async def at_once(url: str, requests: Sequence[Request]) -> list[Answer]:
    """Send all requests at the same time."""
    async with client_of(url) as client:
        started_at = time.perf_counter()
        return await asyncio.gather(*(send(client, one, started_at) for one in requests))


@dataclass(frozen=True)
class Measured:
    """Statistics of one load on one server."""

    images_per_s: float
    answers_per_s: float
    """The same without weights."""
    p50_s: float
    p95_s: float
    answers: int
    """Answers of which the percentiles are taken."""
    wrong: int
    """Answers without the requested image, of the whole load."""


def weights(kinds: Sequence[Kind], solo_s: Mapping[Kind, float]) -> dict[Kind, float]:
    """Return the solo time of each kind as a multiple of the mean of the mix."""
    mean_s = sum(kind.share * solo_s[kind] for kind in kinds) / sum(kind.share for kind in kinds)
    return {kind: solo_s[kind] / mean_s for kind in kinds}


def percentile(values: Sequence[float], share: float) -> float:
    """Return the least value that at least this share of the values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else math.nan


def measured(load: Load, answers: Sequence[Answer], weight_of: Mapping[Kind, float]) -> Measured:
    """Return the statistics of a load; the module's docstring defines them."""
    right = sorted((one for one in answers if one.image() is not None), key=lambda one: one.ended_s)
    end_s = load.settle_s + load.window_s
    from_s = max((one.ended_s for one in right if one.ended_s <= load.settle_s), default=0.0)
    counted = [one for one in right if from_s < one.ended_s <= end_s]
    took_s = counted[-1].ended_s - from_s if counted else math.inf
    latencies_s = [one.took_s for one in right if one.ended_s > load.settle_s]
    return Measured(
        images_per_s=sum(weight_of[one.request.kind] for one in counted) / took_s,
        answers_per_s=len(counted) / took_s,
        p50_s=percentile(latencies_s, 0.5),
        p95_s=percentile(latencies_s, 0.95),
        answers=len(latencies_s),
        wrong=len(answers) - len(right),
    )
