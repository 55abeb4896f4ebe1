"""Count changes of the replicas under a steady load: ``python -m tests.benchmarks.steadiness``.

Requests of 2 s arrive as a Poisson process with a constant rate, in simulated time. The policy has
its default parameters, and a cold start takes 90 s. The count is repeated without the policy's
margin for noise in the arrivals.
"""

import json
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import typer

from serve_app.autoscaling import policy
from tests.autoscaling.cluster import changes_of, targets_under_poisson

BUSY = (0.5, 2.0, 8.0, 25.0)
"""Mean numbers of replicas that the arrivals keep busy."""


def changes_per_hour(busy: float, hours: int) -> float:
    return len(changes_of(targets_under_poisson(busy, hours))) / hours


def main(
    hours: Annotated[int, typer.Option(min=1, help="Simulated hours for each load.")] = 4,
    output: Annotated[Path | None, typer.Option(help="File for the results, as JSON.")] = None,
) -> None:
    """Print the table."""
    rows = []
    for busy in BUSY:
        with_margin = changes_per_hour(busy, hours)
        with patch.object(policy, "_noise", lambda *_: 0.0):
            without = changes_per_hour(busy, hours)
        rows.append(
            {
                "busy": busy,
                "changes_per_hour": with_margin,
                "without_margin_per_hour": without,
            }
        )
        typer.echo(f"{busy:g} busy replicas: {with_margin:g} an hour, {without:g} without margin")
    if output is not None:
        command = f"python -m tests.benchmarks.steadiness --hours {hours}"
        result = {"command": command, "hours": hours, "rows": rows}
        output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
