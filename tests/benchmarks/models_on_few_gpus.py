"""Let three models take turns on two GPUs: ``python -m tests.benchmarks.models_on_few_gpus``.

The program starts Ray with at most two fake GPU nodes and serves four models with 0 to 1 replicas:
the demo, a tiny SDXL, a tiny model that edits, and one that cannot be loaded. One client requests
an image of each in turn, so that two idle models hold the GPUs when the third one needs one. The
replicas and the nodes are noted twice a second. Each image must be the one that the pipeline
generates without a server.
"""

import json
import os
import statistics
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer

from serve_app.autoscaling.policy import ScalingParams
from tests.benchmarks.engine import hardware
from tests.e2e.model_rotation import (
    DEPLOYMENTS,
    NODES,
    Rotation,
    alone,
    phase,
    rotate,
    seconds,
)

MAX_HOLD_S = 450.0
"""The wait after which a request fails: more than by default, for machines with few cores."""

COLORS = {"waiting": "lightgrey", "starting": "tab:orange", "running": "tab:blue"}
"""Colors of the phases in the chart."""

LABELS = {"waiting": "waits for a GPU", "starting": "starts", "running": "runs"}


def largest_difference(rotation: Rotation) -> int:
    """Return the largest difference of a pixel from the pipeline alone, of 255."""
    models = {model["id"]: model for model in rotation.models}
    return max(
        int(np.abs(one.pixels - alone(models[one.model], one.seed).astype(int)).max())
        for one in rotation.answers
    )


def run(turns: int, hold_s: float) -> dict[str, Any]:
    """Serve one rotation; return its requests, and each change of replicas and nodes."""
    with TemporaryDirectory() as folder:
        rotation = rotate(Path(folder), turns, hold_s, MAX_HOLD_S)
        difference = largest_difference(rotation)
    begun_at = rotation.answers[0].sent_at
    requests = [
        {
            "model": one.model,
            "sent_s": round(one.sent_at - begun_at, 2),
            "answered_s": round(one.ended_at - begun_at, 2),
            "waited_s": round(seconds(rotation, one, "waiting"), 2),
            "started_s": round(seconds(rotation, one, "starting"), 2),
        }
        for one in rotation.answers
    ]
    curve = [
        {
            "at_s": round(at - begun_at, 2),
            "nodes": seen.nodes,
            "phases": {model: phase(seen, model) for model in DEPLOYMENTS},
        }
        for at, seen in rotation.snapshots
    ]
    changes = [curve[0]] + [
        after
        for before, after in pairwise(curve)
        if (before["nodes"], before["phases"]) != (after["nodes"], after["phases"])
    ]
    return {
        "hold_s": hold_s,
        "requests": requests,
        "states": rotation.states,
        "largest_difference": difference,
        "ended_s": curve[-1]["at_s"],
        "curve": changes,
    }


def show(result: dict[str, Any]) -> str:
    lines = [
        f"{one['sent_s']:>7.1f} s {one['model']:<10} waits {one['waited_s']:>5.1f} s for a GPU, "
        f"starts in {one['started_s']:>5.1f} s, answer after "
        f"{one['answered_s'] - one['sent_s']:>5.1f} s"
        for one in result["requests"]
    ]
    waits = [one["waited_s"] for one in result["requests"]]
    lines.append(
        f"median wait for a GPU {statistics.median(waits):.1f} s, longest {max(waits):.1f} s; "
        f"largest difference of a pixel {result['largest_difference']} of 255"
    )
    return "\n".join([f"hold_s {result['hold_s']:g}: {result['states']}", *lines])


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw each model's replica and the number of nodes over time, a column for each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    figure, axes = plt.subplots(
        2, len(runs), figsize=(11, 5), squeeze=False, sharex="col", layout="constrained",
        height_ratios=(3, 1),
    )  # fmt: skip
    names = list(DEPLOYMENTS)
    for (replicas, nodes), result in zip(axes.T, runs, strict=True):
        times = [one["at_s"] for one in result["curve"]] + [result["ended_s"]]
        for one, (begun_s, ended_s) in zip(result["curve"], pairwise(times), strict=True):
            for row, name in enumerate(names):
                if one["phases"][name] in COLORS:
                    color = COLORS[one["phases"][name]]
                    replicas.barh(row, ended_s - begun_s, left=begun_s, height=0.6, color=color)
        sent = [(one["sent_s"], names.index(one["model"])) for one in result["requests"]]
        replicas.plot(*zip(*sent, strict=True), "k>", label="request")
        answered = [(one["answered_s"], names.index(one["model"])) for one in result["requests"]]
        replicas.plot(*zip(*answered, strict=True), "ko", label="image")
        replicas.set(
            yticks=range(len(names)), yticklabels=names, title=f"hold_s {result['hold_s']:g}"
        )
        replicas.invert_yaxis()
        counts = [one["nodes"] for one in result["curve"]]
        nodes.step(times, [*counts, counts[-1]], where="post", color="black")
        nodes.set(ylim=(0, NODES + 0.5), yticks=range(NODES + 1), xlabel="seconds")
    axes[1][0].set_ylabel("GPU nodes")
    marks, _ = axes[0][0].get_legend_handles_labels()
    bars = [Patch(color=COLORS[name], label=label) for name, label in LABELS.items()]
    figure.legend(handles=[*bars, *marks], loc="outside upper center", ncols=5)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(
    hold_s: Annotated[
        list[float] | None, typer.Option(help="Time that an idle model keeps its GPU; repeatable.")
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="Turns after the first two models.")] = 2,
    output: Annotated[Path | None, typer.Option(help="File for the results, as JSON.")] = None,
    chart: Annotated[Path | None, typer.Option(help="File for the chart, as PNG.")] = None,
) -> None:
    """Print the requests of each run."""
    runs = []
    hold_s = hold_s or [ScalingParams().hold_s]
    for value in hold_s:
        runs.append(run(turns, value))
        typer.echo(show(runs[-1]))
    if chart is not None:
        draw(runs, chart)
    if output is not None:
        options = " ".join([*(f"--hold-s {value:g}" for value in hold_s), f"--turns {turns}"])
        result = {
            "command": f"python -m tests.benchmarks.models_on_few_gpus {options}",
            "hardware": hardware(torch.device("cpu")) | {"ray": version("ray")},
            "load_average": [round(load, 2) for load in os.getloadavg()],
            "nodes": NODES,
            "runs": runs,
        }
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
