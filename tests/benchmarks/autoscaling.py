"""Compare real scaling with the simulator's: ``python -m tests.benchmarks.autoscaling``.

The program starts Ray with fake GPU nodes, the demo on them and the project's policy. It replays
one minute of arrivals (few, many, few) and notes twice a second the running replicas and the
target. The simulator then replays the same arrivals through the same policy. It uses the step times
that the first replica measured at its start, and the observed start times of nodes and replicas.
Times count from the first arrival.
"""

import bisect
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Annotated, Any

import torch
import typer

from serve_app.autoscaling.params import read_scaling_params
from serve_app.autoscaling.policy import ScalingParams
from serve_app.config.models import EngineConfig
from serve_app.engine.scheduling.cost import CostModel
from serve_app.engine.scheduling.on_time import OnTime
from serve_app.planner.cluster import ClusterParams
from serve_app.planner.inputs import read_costs
from serve_app.planner.replica import costs
from serve_app.planner.scalers import ByWork
from serve_app.planner.simulator import Simulator
from serve_app.planner.trace import Kind, Trace, poisson
from tests.benchmarks.engine import hardware
from tests.e2e.cluster import Answer, Cluster, Watch, generate, scaling_config, start_cluster
from tests.serve_process import free_port

SIZE = (64, 64)
STEPS = 100
PHASES = ((20.0, 0.15), (25.0, 0.6), (25.0, 0.15))
"""Pairs of seconds and requests per second."""

PARAMS: dict[str, float] = {
    "target_drain_s": 5,
    "smoothing_s": 10,
    "hold_s": 10,
    "cold_start_s": 15,
}
MAX_BACKLOG_S = 600.0
"""A limit that rejects no request: in the simulator, a rejected request does not retry."""

NODES = 2
IDLE_MINUTES = 0.2

MEASURED = ("running", "target", "nodes")


@dataclass(frozen=True)
class Curve:
    """Numbers of replicas and nodes over time; each value holds until the next."""

    at_s: Sequence[float]
    running: Sequence[int]
    target: Sequence[int]
    nodes: Sequence[int]
    requests: Sequence[int] | None = None
    """Open requests, on the real cluster only."""

    def value(self, name: str, at_s: float) -> int:
        """Return the value at that time; 0 before the first."""
        index = bisect.bisect_right(self.at_s, at_s) - 1
        values: Sequence[int] = getattr(self, name)
        return values[index] if index >= 0 else 0

    def change(self, name: str, happened: Callable[[int, int], bool], last: bool) -> float | None:
        """Return the time of the first or last such change, or None."""
        values: Sequence[int] = getattr(self, name)
        found = [
            at_s
            for at_s, (before, now) in zip(self.at_s[1:], pairwise(values), strict=True)
            if happened(before, now)
        ]
        return found[-1 if last else 0] if found else None


def arrivals(seed: int) -> list[float]:
    """Draw arrival times in seconds; the first is 0."""
    at_s: list[float] = []
    begins_at = 0.0
    for number, (duration_s, rate) in enumerate(PHASES):
        at_s += [begins_at + at for at in poisson(rate, duration_s, seed + number)]
        begins_at += duration_s
    return [at - at_s[0] for at in at_s]


def real(at_s: Sequence[float], profile: Path) -> tuple[Curve, list[Answer], list[str]]:
    """Replay on a cluster until its last node has ended; return the policy's log lines too."""
    port = free_port()
    config = scaling_config(port, PARAMS)
    engine = config["applications"][0]["args"]["engine"]
    engine |= {
        "profile_path": str(profile),
        "warmup_sizes_px": [list(SIZE)],
        "max_backlog_s": MAX_BACKLOG_S,
    }
    with (
        start_cluster(NODES, IDLE_MINUTES) as cluster,
        ThreadPoolExecutor(len(at_s)) as pool,
        Watch(cluster) as watch,
    ):
        cluster.deploy(config)
        watch.wait(lambda seen: seen.status == "RUNNING", 120, "the gateway")
        begun_at = time.monotonic()
        requests = []
        for seed, due_s in enumerate(at_s):
            Event().wait(max(0.0, begun_at + due_s - time.monotonic()))
            requests.append(pool.submit(generate, f"http://127.0.0.1:{port}", seed, STEPS))
        answers = [request.result() for request in requests]
        watch.wait(lambda seen: seen.nodes == 0, 180, "the nodes to go")
        lines = decisions(cluster)
    since = [(at - begun_at, seen) for at, seen in watch.snapshots]
    curve = Curve(
        [round(at, 2) for at, _ in since],
        [seen.running for _, seen in since],
        [seen.target for _, seen in since],
        [seen.nodes for _, seen in since],
        [
            sum(one.sent_at <= at < one.ended_at for one in answers)
            for at in (at for at, _ in watch.snapshots)
        ],
    )
    return curve, answers, lines


def decisions(cluster: Cluster) -> list[str]:
    """Return the policy's lines in the controller's log."""
    lines = cluster.logs("serve/controller_*.log").splitlines()
    return [line.split(" -- ")[-1] for line in lines if "diffusion-serve/Generator: " in line]


def starts(curve: Curve) -> tuple[float, float]:
    """Return the median seconds from a target to its node, and from the node to a ready replica."""
    nodes_s, replicas_s = [], []
    for number in range(1, NODES + 1):
        times = [
            curve.change(name, lambda before, now: before < number <= now, last=False)  # noqa: B023
            for name in ("target", "nodes", "running")
        ]
        if None not in times:
            target_s, node_s, up_s = (at for at in times if at is not None)
            nodes_s.append(max(0.0, node_s - target_s))
            replicas_s.append(up_s - max(node_s, target_s))
    return statistics.median(nodes_s), statistics.median(replicas_s)


def simulated(
    at_s: Sequence[float], model: CostModel, node_s: float, replica_s: float, until_s: float
) -> Curve:
    """Replay the same arrivals in simulated time."""
    # The simulator ends with the last request: add one after the compared time.
    kinds = [Kind(SIZE, STEPS)] * len(at_s)
    trace = Trace([*at_s, until_s + 60], [*kinds, Kind(SIZE, 1)])
    scaling = asdict(read_scaling_params(PARAMS)) | {"min_replicas": 0, "max_replicas": NODES}
    params = ClusterParams(
        node_start_s=node_s,
        replica_start_s=replica_s,
        node_idle_s=60 * IDLE_MINUTES,
        max_running=EngineConfig().max_running,
        max_backlog_s=MAX_BACKLOG_S,
    )
    scaler = ByWork(ScalingParams(**scaling))
    samples = Simulator(trace, model, OnTime, scaler, params, initial_replicas=0).run().samples
    shown = [sample for sample in samples if sample.at_s <= until_s]
    return Curve(
        [0.0, *(sample.at_s for sample in shown)],
        [0, *(sample.running for sample in shown)],
        [0, *(sample.target for sample in shown)],
        [0, *(sample.nodes for sample in shown)],
    )


def agreement(one: Curve, other: Curve, until_s: float) -> dict[str, Any]:
    """Return the mean absolute differences of two curves, and the times of events in both."""
    grid = [half_seconds / 2 for half_seconds in range(int(2 * until_s))]
    apart = {
        f"{name}_mean_absolute_difference": statistics.mean(
            abs(one.value(name, at) - other.value(name, at)) for at in grid
        )
        for name in MEASURED
    }
    mean = {
        f"{name}_mean": [
            statistics.mean(curve.value(name, at) for at in grid) for curve in (one, other)
        ]
        for name in MEASURED
    }
    events: dict[str, tuple[str, Callable[[int, int], bool], bool]] = {
        "first scale-up": ("target", lambda before, now: now > before, False),
        "last scale-up": ("target", lambda before, now: now > before, True),
        "last replica up": ("running", lambda before, now: now > before, True),
        "first scale-down": ("target", lambda before, now: now < before, False),
        "last scale-down": ("target", lambda before, now: now < before, True),
        "last node gone": ("nodes", lambda before, now: now < before, True),
    }
    times = {
        event: [curve.change(name, happened, last) for curve in (one, other)]
        for event, (name, happened, last) in events.items()
    }
    return apart | mean | {"at_s": times}


def main(
    seed: int = 1,
    output: Annotated[Path | None, typer.Option(help="File for the results, as JSON.")] = None,
) -> None:
    """Print how the two curves agree."""
    at_s = arrivals(seed)
    with TemporaryDirectory() as folder:
        profile = Path(folder) / "profile.json"
        measured, answers, lines = real(at_s, profile)
        model = read_costs(profile, 16)
    node_s, replica_s = starts(measured)
    until_s = measured.at_s[-1]
    predicted = simulated(at_s, model, node_s, replica_s, until_s)
    kind = Kind(SIZE, STEPS)
    solo_s = costs(model, [kind])[kind].solo_s
    agreed = agreement(measured, predicted, until_s)
    took_s = [answer.ended_at - answer.sent_at for answer in answers]
    typer.echo(
        f"{len(at_s)} requests of {kind}, {solo_s:.2f} s alone; a node {node_s:.1f} s, a replica "
        f"{replica_s:.1f} s; median answer {statistics.median(took_s):.1f} s, longest "
        f"{max(took_s):.1f} s, {sum(answer.rejections for answer in answers)} rejections"
    )
    for name in MEASURED:
        both = agreed[f"{name}_mean"]
        typer.echo(
            f"{name:<9} mean {both[0]:.2f} real, {both[1]:.2f} simulated; apart by "
            f"{agreed[f'{name}_mean_absolute_difference']:.2f}"
        )
    for event, times in agreed["at_s"].items():
        shown = ["never" if at is None else f"{at:.1f} s" for at in times]
        typer.echo(f"{event:<17}{shown[0]:>9} real {shown[1]:>9} simulated")
    typer.echo("\n".join(lines))
    if output is not None:
        result = {
            "command": f"python -m tests.benchmarks.autoscaling --seed {seed}",
            "hardware": hardware(torch.device("cpu")) | {"ray": version("ray")},
            "load_average": [round(load, 2) for load in os.getloadavg()],
            "scaling_params": PARAMS,
            "arrivals_s": [round(at, 3) for at in at_s],
            "kind": str(kind),
            "solo_s": solo_s,
            "node_start_s": node_s,
            "replica_start_s": replica_s,
            "answer_s": {"median": statistics.median(took_s), "longest": max(took_s)},
            "rejections": sum(answer.rejections for answer in answers),
            "agreement": agreed,
            "decisions": lines,
            "real": asdict(measured),
            "simulated": asdict(predicted),
        }
        output.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    typer.run(main)
