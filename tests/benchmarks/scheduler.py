"""Measure one decision of each scheduling policy: ``python -m tests.benchmarks.scheduler``."""

import json
import os
import statistics
import time
from pathlib import Path
from random import Random
from typing import Annotated

import torch
import typer

from serve_app.engine.scheduling.cost import CostModel, Measurement
from serve_app.engine.scheduling.policies import POLICIES
from serve_app.engine.scheduling.queue import QueueEntry
from tests.benchmarks.engine import hardware
from tests.engine.scheduling.simulated_device import MeasuredCosts

SIZES = [(512, 512), (768, 768), (1024, 1024), (1536, 1536)]


CASES = [("on_time, half named", "on_time", 0.5), *((name, name, 0.0) for name in POLICIES)]
"""Names in the table, policies, and shares of requests whose client named the deadline."""


def decisions(
    name: str, named_share: float, requests: int, count: int
) -> tuple[list[float], list[float]]:
    """Return seconds of decisions among a constant number of parked requests.

    The first list has the decisions after a change of the requests, the second one the others. A
    step ends its request with a probability of 1/20, as with 20 steps a request, and another
    request arrives.
    """
    rng = Random(0)
    policy = POLICIES[name]()
    cost = CostModel(max_batch_size=16)
    for size in SIZES:
        call_s = {batch: 0.01 + 1e-8 * size[0] * size[1] * batch for batch in (1, 2, 4, 8, 16)}
        cost.measured(size, Measurement(call_s, encode_s=0.01, decode_s=0.05))
    costs = MeasuredCosts(cost)
    now = 0.0

    def new(number: int) -> QueueEntry:
        size = rng.choice(SIZES)
        solo_s = 20 * cost.predict_call(size)
        deadline_at = now + rng.uniform(0, 2 * requests) * solo_s
        entry = QueueEntry(
            number,
            deadline_at,
            solo_s,
            size,
            solo_s / 20,
            named=rng.random() < named_share,
            arrived_at=now,
        )
        policy.add(entry)
        policy.park(entry)
        return entry

    for number in range(requests):
        new(number)
    after_changes, others = [], []
    number, changed = requests, True
    for _ in range(count):
        started_at = time.perf_counter()
        chosen = policy.choose(now, costs)
        (after_changes if changed else others).append(time.perf_counter() - started_at)
        now += chosen[0].step_s
        changed = False
        for entry in chosen:
            if rng.random() < 0.05:
                policy.drop(entry)
                new(number)
                number += 1
                changed = True
            else:
                entry.remaining_s = max(entry.step_s, entry.remaining_s - entry.step_s)
                policy.park(entry)
    return after_changes, others


def main(
    requests: Annotated[int, typer.Option(help="Number of parked requests.")] = 128,
    count: Annotated[int, typer.Option(help="Decisions to measure.")] = 20_000,
    output: Annotated[Path | None, typer.Option(help="File for the results, as JSON.")] = None,
) -> None:
    """Print one line for each policy."""
    busy = os.getloadavg()[0]
    typer.echo(f"{requests} requests, {count} decisions, microseconds")
    rows = []
    for label, name, named_share in CASES:
        changed, others = decisions(name, named_share, requests, count)
        row: dict[str, str | float] = {"policy": label}
        for kind, seconds in (("", changed + others), ("after_change_", changed)):
            taken = sorted(second * 1e6 for second in seconds)
            row |= {
                f"{kind}median_us": statistics.median(taken),
                f"{kind}mean_us": statistics.mean(taken),
                f"{kind}p99_us": taken[int(0.99 * len(taken))],
                f"{kind}max_us": taken[-1],
            }
        rows.append(row)
        typer.echo(
            f"{label:<20} median {row['median_us']:6.1f}   p99 {row['p99_us']:6.1f}   "
            f"after a change: median {row['after_change_median_us']:6.1f}   "
            f"p99 {row['after_change_p99_us']:6.1f}"
        )
    if output is not None:
        result = {
            "command": f"python -m tests.benchmarks.scheduler --requests {requests} "
            f"--count {count}",
            "hardware": hardware(torch.device("cpu")),
            "load_average_before": busy,
            "requests": requests,
            "decisions": count,
            "rows": rows,
        }
        output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
