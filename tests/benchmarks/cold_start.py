"""How long a start takes, and what an earlier one saves: ``python -m tests.benchmarks.cold_start``.

Each start is a process of its own, with the demo model on the CPU: first without the file of an
earlier start, then with it, in turns. The phases are those that the engine itself reports. What
comes before, from the making of the process to the loading, is Python and its imports.

Of the sizes of the config, ``none`` is as in configs/demo.yaml, ``four`` those of the mix of
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
    """One line of the table: medians, in seconds."""

    sizes: str
    start: str
    imports_s: float
    phases_s: dict[str, float]
    total_s: float
    """Of the phases."""
    total_from_s: float
    total_to_s: float
    """The quickest and the slowest start."""


def start_here(config: EngineConfig) -> None:
    """In a process made for it: print what one start took."""
    imports_s = time.time() - psutil.Process().create_time()
    with Engine.load(MODEL, config) as engine:
        start = engine._start
        said = {"imports": imports_s, "reuse": start.reuse, "phases": start.phases_s}
        print(json.dumps(said | {"total": engine.cold_start_s}))


def start(config: EngineConfig) -> dict[str, Any]:
    """What `start_here` printed."""
    command = [sys.executable, "-m", "tests.benchmarks.cold_start", "--engine"]
    result = subprocess.run(
        [*command, config.model_dump_json()],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    said: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return said


def measure(repeats: int, folder: Path) -> list[Row]:
    """In turns, so that a slow minute of the machine hits all alike."""
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
                said = start(config)
                assert said["reuse"].startswith(reuse), said["reuse"]
                found.setdefault((name, way), []).append(said)
    return [
        Row(
            sizes=name,
            start=way,
            imports_s=statistics.median(said["imports"] for said in starts),
            phases_s={
                phase: statistics.median(said["phases"][phase] for said in starts)
                for phase in starts[0]["phases"]
            },
            total_s=statistics.median(said["total"] for said in starts),
            total_from_s=min(said["total"] for said in starts),
            total_to_s=max(said["total"] for said in starts),
        )
        for (name, way), starts in found.items()
    ]


def main(
    repeats: int = 5,
    output: Annotated[Path | None, typer.Option(help="Write the figures here, as JSON.")] = None,
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
            "command": "python -m tests.benchmarks.cold_start",
            "hardware": hardware(torch.device("cpu")),
            "repeats": repeats,
            "rows": [asdict(row) for row in rows],
        }
        output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
