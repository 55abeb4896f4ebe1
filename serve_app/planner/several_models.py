"""Plans several models that share a pool of GPUs, each by the policy in its config.

`comparison` compares policies for one model. The simulator is the same.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from serve_app.autoscaling.policy import ScalingParams
from serve_app.errors import ConfigError
from serve_app.planner.cluster import Sample, SimulationOutcome
from serve_app.planner.comparison import CURVE_POINTS, Candidate, Scenario, wait_quantiles
from serve_app.planner.nodes import NodePool
from serve_app.planner.simulator import run_together

POOL = "all models"
"""Label of the row for the pool."""


@dataclass(frozen=True)
class PlannedModel:
    """One of the models, with its load and its bounds."""

    id: str
    scenario: Scenario
    """Its first trace is replayed. Times of nodes are those of the first model."""
    scaling: ScalingParams


@dataclass(frozen=True)
class ModelRow:
    """The result of a model, or of the pool."""

    label: str
    requests: int
    attainment: float
    """Share of all requests that finished before their deadlines."""
    rejected: float
    """Share of all requests that were rejected."""
    p50_s: float
    p95_s: float
    """Time from arrival to end."""
    mean_replicas: float
    """Running replicas, averaged over time."""
    most: int
    """Largest number of running replicas of a model; of GPUs that the pool had."""
    gpu_hours: float
    gpu_wait_hours: float
    """Time during which at least one replica waited for a GPU."""
    curve: tuple[Sample, ...]
    """Empty for the pool. All models have the same times."""


def simulate_together(models: Sequence[PlannedModel], gpus: int | None) -> list[ModelRow]:
    """Simulate all models on at most so many GPUs; the last row is that of the pool.

    ``gpus`` None: as many as the models request.

    Raises:
        ConfigError: if there are too few GPUs for each model to have its turn.
    """
    _check_bounds(models, gpus)
    pool = NodePool(models[0].scenario.cluster, math.inf if gpus is None else gpus)
    outcomes = run_together(
        [
            one.scenario.simulator(Candidate("work", one.id, one.scaling), pool=pool)
            for one in models
        ]
    )
    length = min(len(outcome.samples) for outcome in outcomes)
    stride = max(1, length // CURVE_POINTS)
    rows = [
        _row(one, outcome, tuple(outcome.samples[:length:stride]))
        for one, outcome in zip(models, outcomes, strict=True)
    ]
    return [*rows, _pool_row(rows, outcomes, pool)]


def _check_bounds(models: Sequence[PlannedModel], gpus: int | None) -> None:
    """A model that keeps its last replica never returns that GPU, so that others need their own."""
    kept = sum(one.scaling.min_replicas for one in models)
    taking_turns = any(one.scaling.min_replicas == 0 for one in models)
    if gpus is not None and gpus < kept + taking_turns:
        turns = ", and the models with min_replicas 0 need one more" if taking_turns else ""
        raise ConfigError(
            f"--gpus is {gpus}, but {kept + taking_turns} are needed: the min_replicas of the "
            f"models add up to {kept}{turns}."
        )


def _row(model: PlannedModel, outcome: SimulationOutcome, curve: tuple[Sample, ...]) -> ModelRow:
    running = [sample.running for sample in outcome.samples] or [model.scaling.min_replicas]
    return ModelRow(
        model.id,
        outcome.requests,
        outcome.attainment,
        outcome.rejected / max(1, outcome.requests),
        *wait_quantiles([outcome]),
        statistics.mean(running),
        max(running),
        outcome.gpu_hours,
        outcome.gpu_wait_s / 3_600,
        curve,
    )


def _pool_row(
    rows: Sequence[ModelRow], outcomes: Sequence[SimulationOutcome], pool: NodePool
) -> ModelRow:
    requests = sum(outcome.requests for outcome in outcomes)
    return ModelRow(
        POOL,
        requests,
        sum(outcome.on_time for outcome in outcomes) / requests if requests else 1.0,
        sum(outcome.rejected for outcome in outcomes) / max(1, requests),
        *wait_quantiles(outcomes),
        sum(row.mean_replicas for row in rows),
        pool.usage.most_nodes,
        pool.usage.gpu_s / 3_600,
        pool.usage.waited_s / 3_600,
        (),
    )


def table(rows: Sequence[ModelRow], price_per_gpu_hour: float | None) -> str:
    """Format the results, one per line."""
    width = max(len(row.label) for row in rows)
    heading = (
        f"{'':<{width}} {'requests':>8} {'in time':>8} {'rejected':>8} {'p50':>8} {'p95':>8}"
        f" {'mean':>6} {'most':>5} {'GPU-hours':>10} {'GPU wait':>9}"
    )
    lines = [heading + ("" if price_per_gpu_hour is None else f" {'cost':>10}")]
    for row in rows:
        line = (
            f"{row.label:<{width}} {row.requests:>8} {row.attainment:>8.1%} {row.rejected:>8.1%}"
            f" {row.p50_s:>6.1f} s {row.p95_s:>6.1f} s {row.mean_replicas:>6.2f} {row.most:>5}"
            f" {row.gpu_hours:>10.2f} {row.gpu_wait_hours:>7.2f} h"
        )
        if price_per_gpu_hour is not None:
            line += f" {row.gpu_hours * price_per_gpu_hour:>10.2f}"
        lines.append(line)
    return "\n".join(lines)


def verdict(rows: Sequence[ModelRow], slo_share: float) -> str:
    """Name the models that miss the SLO, one per line."""
    late = [
        f"{row.label} has {row.attainment:.1%} in time, under {slo_share:.0%}"
        for row in rows[:-1]
        if row.attainment < slo_share
    ]
    return "\n".join(late) or f"each model has at least {slo_share:.0%} in time"


def as_json(rows: Sequence[ModelRow]) -> list[dict[str, object]]:
    """Convert the results to JSON values, without the curves."""
    return [{key: value for key, value in asdict(row).items() if key != "curve"} for row in rows]
