"""Overload a server threefold for two minutes: ``python -m tests.benchmarks.overload``.

The program starts ``serve run`` on the demo and sends a mix of sizes and steps, as Poisson arrivals
that do not wait for each other. Each request has a deadline: three times its time alone over HTTP,
at least one second. A rejected request retries once, after ``Retry-After``, with a new deadline.

Capacity is the images per second of the same mix from sixteen clients without pauses or deadlines.
Goodput is the images per second that met their deadline. Every load runs once a round, in turns,
because machines drift. The peak is the best median of the loads below the overload. Requests that
end after the last arrival count for the retry reservations, but not for the goodput.
"""

import asyncio
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import httpx
import torch
import typer

from tests.benchmarks.engine import MIX, hardware
from tests.serve_process import demo_config, free_port, serving_config

PATH = "/v1/images/generations"
NATIVE_PX = 64
DEADLINE_SCALE = 3.0
LEAST_DEADLINE_S = 1.0
CLIENTS = 16

LOADS = (0.9, 1.0, 1.2)
"""Shares of capacity around the peak of goodput: deadlines leave no time for full batches."""

OVERLOAD = 3.0


@dataclass(frozen=True)
class Kind:
    """One kind of request, with its share of all requests."""

    side_px: int
    steps: int
    share: float


KINDS = [Kind(round(NATIVE_PX * scale / 8) * 8, steps, share / 100) for scale, steps, share in MIX]


@dataclass
class Outcome:
    """Outcome of one request, including its second try."""

    kind: Kind
    sent_s: float
    """Time of the last try since the start of the run."""
    status: int = 0
    ended_s: float = 0.0
    queue_s: float | None = None
    reserved_s: float | None = None
    """The first ``Retry-After``, if the request was rejected."""

    @property
    def took_s(self) -> float:
        return self.ended_s - self.sent_s


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    load: float
    """Arrivals as a share of capacity."""
    seconds: float
    sent: int
    goodput_per_s: float
    rejected: float
    """Share of requests that were rejected at the first try."""
    queue_p50_s: float
    queue_p95_s: float
    queue_max_s: float
    in_time: float
    """Share of the admitted requests, at either try, that met their deadline."""
    retry_after_p50_s: float
    retry_after_max_s: float
    reservations: int
    reservations_kept: float
    """Share of second tries that were admitted."""
    reservations_in_time: float
    """Share of second tries that met their deadline."""
    errors: int
    """Responses other than 200 and 429."""


class Client:
    """A client of the demo's server."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._seeds = itertools.count(1)

    def body(self, kind: Kind, deadline_s: float | None = None) -> dict[str, Any]:
        body: dict[str, Any] = {
            "prompt": "a red circle on blue",
            "seed": next(self._seeds),
            "size": f"{kind.side_px}x{kind.side_px}",
            "num_inference_steps": kind.steps,
        }
        return body if deadline_s is None else body | {"deadline_s": deadline_s}

    async def send(self, body: dict[str, Any]) -> httpx.Response:
        return await self._client.post(PATH, json=body)

    async def solo_s(self, kind: Kind) -> float:
        taken = []
        for _ in range(6):
            started_at = time.perf_counter()
            (await self.send(self.body(kind))).raise_for_status()
            taken.append(time.perf_counter() - started_at)
        return statistics.median(taken[1:])

    async def capacity(self, seconds: float, seed: int) -> float:
        """Return images per second of the mix while there is always more to do."""
        kinds = mixed(Random(seed))
        ends_at = time.perf_counter() + seconds
        done = 0

        async def send_until_end() -> None:
            nonlocal done
            while time.perf_counter() < ends_at:
                response = await self.send(self.body(next(kinds)))
                if response.status_code == 429:  # reserved for an earlier run
                    await asyncio.sleep(float(response.headers["retry-after"]))
                else:
                    response.raise_for_status()
                    done += time.perf_counter() < ends_at

        await asyncio.gather(*(send_until_end() for _ in range(CLIENTS)))
        return done / seconds

    async def run(
        self, rate: float, seconds: float, deadlines_s: dict[Kind, float], seed: int
    ) -> list[Outcome]:
        rng = Random(seed)
        kinds = mixed(rng)
        started_at = time.perf_counter()

        async def send_twice(outcome: Outcome) -> None:
            body = self.body(outcome.kind, deadlines_s[outcome.kind])
            for attempt in range(2):
                outcome.sent_s = time.perf_counter() - started_at
                response = await self.send(body)
                outcome.ended_s = time.perf_counter() - started_at
                outcome.status = response.status_code
                if response.status_code == 200:
                    outcome.queue_s = response.json()["timings"]["queue_s"]
                if response.status_code != 429 or attempt:
                    return
                outcome.reserved_s = float(response.headers["retry-after"])
                await asyncio.sleep(outcome.reserved_s)

        outcomes, tasks = [], []
        at_s = 0.0
        while (at_s := at_s + rng.expovariate(rate)) < seconds:
            await asyncio.sleep(started_at + at_s - time.perf_counter())
            outcomes.append(Outcome(next(kinds), at_s))
            tasks.append(asyncio.ensure_future(send_twice(outcomes[-1])))
        await asyncio.gather(*tasks)
        return outcomes


def mixed(rng: Random) -> Iterator[Kind]:
    while True:
        yield rng.choices(KINDS, [kind.share for kind in KINDS])[0]


def share(some: int, of: int) -> float:
    return some / of if of else float("nan")


def row(
    load: float, seconds: float, outcomes: list[Outcome], deadlines_s: dict[Kind, float]
) -> Row:
    done = [one for one in outcomes if one.status == 200]
    met = [one for one in done if one.took_s <= deadlines_s[one.kind]]
    rejected = [one for one in outcomes if one.reserved_s is not None]
    queue_s = sorted(one.queue_s for one in done if one.queue_s is not None)
    waits_s = sorted(one.reserved_s for one in rejected if one.reserved_s is not None) or [0.0]
    return Row(
        load=load,
        seconds=seconds,
        sent=len(outcomes),
        goodput_per_s=sum(one.ended_s <= seconds for one in met) / seconds,
        rejected=share(len(rejected), len(outcomes)),
        queue_p50_s=statistics.median(queue_s),
        queue_p95_s=queue_s[int(0.95 * len(queue_s))],
        queue_max_s=queue_s[-1],
        in_time=share(len(met), len(done)),
        retry_after_p50_s=statistics.median(waits_s),
        retry_after_max_s=waits_s[-1],
        reservations=len(rejected),
        reservations_kept=share(sum(one.status == 200 for one in rejected), len(rejected)),
        reservations_in_time=share(sum(one.reserved_s is not None for one in met), len(rejected)),
        errors=sum(one.status not in (200, 429) for one in outcomes),
    )


def config_of(port: int) -> dict[str, Any]:
    config: dict[str, Any] = demo_config(port)
    engine = config["applications"][0]["args"]["engine"]
    engine["warmup_sizes_px"] = [[kind.side_px, kind.side_px] for kind in KINDS]
    return config


async def measure(url: str, seconds: float, rounds: int, seed: int) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
    async with httpx.AsyncClient(base_url=url, timeout=900, limits=limits) as client:
        load_client = Client(client)
        solo_s = {kind: await load_client.solo_s(kind) for kind in KINDS}
        deadlines_s = {
            kind: max(LEAST_DEADLINE_S, DEADLINE_SCALE * taken) for kind, taken in solo_s.items()
        }
        capacity = await load_client.capacity(min(30.0, seconds), seed)
        typer.echo(f"capacity {capacity:.2f} images/s")
        for kind in KINDS:
            typer.echo(
                f"  {kind.side_px}x{kind.side_px}, {kind.steps} steps, {kind.share:.0%}: "
                f"{solo_s[kind]:.2f} s alone, deadline {deadlines_s[kind]:.2f} s"
            )
        rows = []
        for number, load in itertools.product(range(rounds), (*LOADS, OVERLOAD)):
            outcomes = await load_client.run(load * capacity, seconds, deadlines_s, seed + number)
            rows.append(row(load, seconds, outcomes, deadlines_s))
            typer.echo(str(rows[-1]))
        capacity_after = await load_client.capacity(min(30.0, seconds), seed)
    goodput_per_s = {
        load: statistics.median(one.goodput_per_s for one in rows if one.load == load)
        for load in (*LOADS, OVERLOAD)
    }
    peak = max(goodput_per_s[load] for load in LOADS)
    return {
        "kinds": [
            asdict(kind) | {"solo_s": solo_s[kind], "deadline_s": deadlines_s[kind]}
            for kind in KINDS
        ],
        "capacity_per_s": [capacity, capacity_after],
        "rows": [asdict(one) for one in rows],
        "goodput_per_s": {str(load): median for load, median in goodput_per_s.items()},
        "peak_goodput_per_s": peak,
        "goodput_ratio": goodput_per_s[OVERLOAD] / peak,
    }


def show(result: dict[str, Any]) -> str:
    lines = [
        f"{'load':>5}{'sent':>6}{'goodput/s':>11}{'rejected':>9}{'in time':>9}{'queue p50':>11}"
        f"{'p95':>7}{'max s':>7}{'retry p50':>11}{'max s':>7}{'kept':>7}{'in time':>9}"
    ]
    lines += [
        f"{one['load']:>5.1f}{one['sent']:>6}{one['goodput_per_s']:>11.2f}{one['rejected']:>9.0%}"
        f"{one['in_time']:>9.0%}{one['queue_p50_s']:>11.2f}{one['queue_p95_s']:>7.2f}"
        f"{one['queue_max_s']:>7.2f}{one['retry_after_p50_s']:>11.0f}"
        f"{one['retry_after_max_s']:>7.0f}{one['reservations_kept']:>7.0%}"
        f"{one['reservations_in_time']:>9.0%}"
        for one in result["rows"]
    ]
    before, after = result["capacity_per_s"]
    lines += [
        f"median at {load}: {goodput:.2f}" for load, goodput in result["goodput_per_s"].items()
    ]
    lines.append(f"capacity {before:.2f} images/s, at the end {after:.2f}")
    lines.append(f"goodput at 3.0 over its peak: {result['goodput_ratio']:.0%}")
    return "\n".join(lines)


def main(
    seconds: Annotated[float, typer.Option(help="Seconds of arrivals for each load.")] = 120.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of all loads.")] = 3,
    seed: int = 0,
    output: Annotated[Path | None, typer.Option(help="File for the results, as JSON.")] = None,
) -> None:
    """Print the table."""
    with serving_config(config_of(free_port())) as url:
        busy = os.getloadavg()[0]
        result = asyncio.run(measure(url, seconds, rounds, seed))
    typer.echo(show(result))
    if output is not None:
        content = {
            "command": f"python -m tests.benchmarks.overload --rounds {rounds}",
            "hardware": hardware(torch.device("cpu")),
            "load_average_before": busy,
            "seconds": seconds,
            "rounds": rounds,
            "seed": seed,
            "deadline_scale": DEADLINE_SCALE,
            "least_deadline_s": LEAST_DEADLINE_S,
            **result,
        }
        output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
