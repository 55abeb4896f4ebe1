"""Measure the cost of server-sent events: ``python -m tests.benchmarks.sse``.

The program starts ``serve run`` on the demo and requests the same image, one request at a time, in
turns: as plain JSON, as a stream of the image only, with an event for each step, and with three
previews as well. The cost of a step is the difference of the medians over the number of steps. The
time of the first event counts from the sending of the request, on an idle server.
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import torch
import typer

from tests.benchmarks.engine import hardware
from tests.serve_process import demo_config, free_port, start_serve

WAYS: dict[str, dict[str, Any]] = {
    "json": {},
    "stream": {"stream": True},
    "stream, progress": {"stream": True, "progress": True},
    "stream, progress, previews": {"stream": True, "progress": True, "partial_images": 3},
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    way: str
    total_ms: float
    """Median time from sending the request to the end of the response."""
    first_event_ms: float | None
    first_event_worst_ms: float | None
    events: float
    """Mean number of events in a response."""
    cost_ms_per_step: float
    """Additional time over plain JSON."""


def request(client: httpx.Client, body: dict[str, Any]) -> tuple[float, float | None, int]:
    """Return seconds to the end and to the first event, and the number of events."""
    started_at = time.perf_counter()
    first_s, events = None, 0
    with client.stream("POST", "/v1/images/generations", json=body) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("event: "):
                assert line != "event: error"
                events += 1
                if first_s is None:
                    first_s = time.perf_counter() - started_at
    return time.perf_counter() - started_at, first_s, events


def main(
    steps: int = 50,
    repeats: int = 30,
    output: Annotated[Path | None, typer.Option(help="File for the results, as JSON.")] = None,
) -> None:
    """Print the table."""
    port = free_port()
    running = start_serve(demo_config(port))
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            running.wait_until_ready(f"http://127.0.0.1:{port}")
            body = {"prompt": "a red circle on blue", "seed": 1, "num_inference_steps": steps}
            answers: dict[str, list[tuple[float, float | None, int]]] = {way: [] for way in WAYS}
            for repeat in range(repeats + 2):
                for way, change in WAYS.items():
                    answer = request(client, body | change)
                    if repeat >= 2:  # the first repeats warm up
                        answers[way].append(answer)
    finally:
        running.stop()
    plain_s = statistics.median(total for total, _, _ in answers["json"])
    rows = []
    for way, given in answers.items():
        total_s = statistics.median(total for total, _, _ in given)
        firsts = [first for _, first, _ in given if first is not None]
        rows.append(
            Row(
                way=way,
                total_ms=1e3 * total_s,
                first_event_ms=1e3 * statistics.median(firsts) if firsts else None,
                first_event_worst_ms=1e3 * max(firsts) if firsts else None,
                events=statistics.mean(events for _, _, events in given),
                cost_ms_per_step=1e3 * (total_s - plain_s) / steps,
            )
        )
    typer.echo(f"{steps} steps, median of {repeats} requests each, in turns")
    typer.echo(f"{'':<28}{'total ms':>9}{'first ms':>10}{'worst':>8}{'events':>8}{'ms a step':>11}")
    for row in rows:
        first, worst = (
            "" if value is None else f"{value:.0f}"
            for value in (row.first_event_ms, row.first_event_worst_ms)
        )
        typer.echo(
            f"{row.way:<28}{row.total_ms:>9.0f}{first:>10}{worst:>8}{row.events:>8.1f}"
            f"{row.cost_ms_per_step:>11.2f}"
        )
    if output is not None:
        result = {
            "command": f"python -m tests.benchmarks.sse --steps {steps} --repeats {repeats}",
            "hardware": hardware(torch.device("cpu")),
            "steps": steps,
            "repeats": repeats,
            "rows": [asdict(row) for row in rows],
        }
        output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
