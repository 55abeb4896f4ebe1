"""What one decision of each policy costs: ``python -m tests.benchmarks.scheduler``."""

import statistics
import time
from random import Random
from typing import Annotated

import typer

from serve_app.engine.scheduler import POLICIES, Task

CAPS = {"512": 16, "768": 8, "1024": 2, "1536": 1}


def decisions(name: str, requests: int, count: int) -> list[float]:
    """Seconds that each of ``count`` decisions took, among always as many parked requests.

    Every twentieth step ends a request and brings another, as with twenty steps a request.
    """
    rng = Random(0)
    policy = POLICIES[name]()
    now = 0.0

    def new(number: int) -> Task:
        alone_s = rng.uniform(0.5, 10.0)
        key = rng.choice(list(CAPS))
        task = Task(number, now + rng.uniform(0, 40) * alone_s, alone_s, key, alone_s / 20)
        policy.add(task)
        policy.park(task)
        return task

    for number in range(requests):
        new(number)
    taken = []
    number = requests
    for _ in range(count):
        started_at = time.perf_counter()
        chosen = policy.choose(now, lambda task, _: CAPS[str(task.key)])
        taken.append(time.perf_counter() - started_at)
        now += chosen[0].step_s
        for task in chosen:
            if rng.random() < 0.05:
                policy.drop(task)
                new(number)
                number += 1
            else:
                task.remaining_s = max(task.step_s, task.remaining_s - task.step_s)
                policy.park(task)
    return taken


def main(
    requests: Annotated[int, typer.Option(help="Parked at a time.")] = 128,
    count: Annotated[int, typer.Option(help="Decisions to measure.")] = 20_000,
) -> None:
    """Print a line for each policy."""
    typer.echo(f"{requests} requests, {count} decisions, microseconds")
    for name in POLICIES:
        taken = sorted(second * 1e6 for second in decisions(name, requests, count))
        typer.echo(
            f"{name:<16} median {statistics.median(taken):6.1f}"
            f"   mean {statistics.mean(taken):6.1f}"
            f"   p99 {taken[int(0.99 * count)]:6.1f}   most {taken[-1]:6.1f}"
        )


if __name__ == "__main__":
    typer.run(main)
