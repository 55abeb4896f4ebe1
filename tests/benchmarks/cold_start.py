"""Measure starts with and without a profile: ``python -m tests.benchmarks.cold_start``.

Each start is a process of its own with the demo model on the CPU: first without the profile of an
earlier start, then with it, in turns. The engine itself reports the phases. The time before them,
from the start of the process to the loading, is Python and its imports.

The sizes ``none`` are those of configs/demo.yaml, ``four`` those of the mix of
`tests.benchmarks.engine`.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from tests.benchmarks.engine import hardware

SIZES: dict[str, tuple[tuple[int, int], ...]] = {
    "none": (),
    "four": ((32, 32), (48, 48), (64, 64), (96, 96)),
}

MODEL = ModelConfig(id="demo", device="cpu", default_steps=20)


@dataclass(frozen=True)
class Row:
    """One line of the table: medians in seconds."""

    sizes: str
    start: str
    imports_s: float
    phases_s: dict[str, float]
    total_s: float
    """Sum of the phases."""
    total_from_s: float
    total_to_s: float
    """Sums of the quickest and of the slowest start."""


def start_here(config: EngineConfig) -> None:
    """Start an engine in this process and print the durations of its phases."""
    imports_s = time.time() - psutil.Process().create_time()
    with Engine.load(MODEL, config) as engine:
        start = engine.cold_start
        reported = {"imports": imports_s, "reuse": start.reuse, "phases": start.phases_s}
        print(json.dumps(reported | {"total": engine.cold_start.total_s}))


def start(config: EngineConfig) -> dict[str, Any]:
    """Run `start_here` in a new process and return what it printed."""
    command = [sys.executable, "-m", "tests.benchmarks.cold_start", "--engine"]
    result = subprocess.run(
        [*command, config.model_dump_json()],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    reported: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return reported


def measure(repeats: int, folder: Path) -> list[Row]:
    """Measure all variants in turns, so that a slow minute of the machine affects all of them."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(repeats):
        for name, sizes in SIZES.items():
            path = folder / f"{name}.json"
            path.unlink(missing_ok=True)
            config = EngineConfig(warmup_sizes_px=sizes, profile_path=str(path))
            for way, reuse in (
                ("first", "certification and caps found"),
                ("again", "certification reused"),
            ):
                reported = start(config)
                assert reported["reuse"].startswith(reuse), reported["reuse"]
                found.setdefault((name, way), []).append(reported)
    return [
        Row(
            sizes=name,
            start=way,
            imports_s=statistics.median(reported["imports"] for reported in starts),
            phases_s={
                phase: statistics.median(reported["phases"][phase] for reported in starts)
                for phase in starts[0]["phases"]
            },
            total_s=statistics.median(reported["total"] for reported in starts),
            total_from_s=min(reported["total"] for reported in starts),
            total_to_s=max(reported["total"] for reported in starts),
        )
        for (name, way), starts in found.items()
    ]


def main(
    repeats: int = 5,
    output: Annotated[Path | None, typer.Option(help="File for the results, as JSON.")] = None,
    engine: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print the table."""
    if engine is not None:
        start_here(EngineConfig.model_validate_json(engine))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(repeats, Path(folder))
    phases = list(rows[0].phases_s)
    typer.echo(f"seconds, median of {repeats} starts each, in turns")
    titles = ["imports", *phases, "total", "from", "to"]
    typer.echo(f"{'sizes':<6}{'start':<7}" + "".join(f"{title:>9}" for title in titles))
    for row in rows:
        values = [row.imports_s, *row.phases_s.values()]
        values += [row.total_s, row.total_from_s, row.total_to_s]
        typer.echo(f"{row.sizes:<6}{row.start:<7}" + "".join(f"{value:>9.2f}" for value in values))
    if output is not None:
        result = {
            "command": f"python -m tests.benchmarks.cold_start --repeats {repeats}",
            "hardware": hardware(torch.device("cpu")),
            "repeats": repeats,
            "rows": [asdict(row) for row in rows],
        }
        output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
