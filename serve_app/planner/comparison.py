"""Compares scaling policies on one trace, to size a cluster before it is bought."""

import itertools
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

from serve_app.autoscaling.policy import ScalingParams
from serve_app.engine.scheduling.cost import CostModel
from serve_app.engine.scheduling.policies import new_policy
from serve_app.planner.cluster import ClusterParams, Sample, SimulationOutcome
from serve_app.planner.inputs import Family
from serve_app.planner.nodes import NodePool
from serve_app.planner.replica import costs as costs_of
from serve_app.planner.scalers import ByCount, ByWork, Fixed, Scaler
from serve_app.planner.serve_policy import QueueParams
from serve_app.planner.simulator import Simulator
from serve_app.planner.trace import Trace

NAMES: dict[Family, str] = {
    "work": "by work",
    "count": "by count (Ray Serve's default)",
    "fixed": "fixed size",
}

CURVE_POINTS = 400
"""Samples of a run that are kept for the chart."""


@dataclass(frozen=True)
class Candidate:
    """One scaling policy with its parameters."""

    family: Family
    label: str
    params: ScalingParams | QueueParams | int

    def scaler(self) -> Scaler:
        match self.params:
            case ScalingParams():
                return ByWork(self.params)
            case QueueParams():
                return ByCount(self.params)
            case int():
                return Fixed(self.params)

    @property
    def initial_replicas(self) -> int:
        return self.params if isinstance(self.params, int) else self.params.min_replicas


@dataclass(frozen=True)
class Row:
    """The result of a candidate."""

    family: Family
    label: str
    attainment: float
    """Share of all requests that finished before their deadlines."""
    rejected: float
    """Share of all requests that were rejected."""
    gpu_hours: float
    work_hours: float
    """Solo work of all requests: the lower bound of GPU-hours without batches."""
    p50_s: float
    p95_s: float
    """Time from arrival to end."""
    most_replicas: int
    scale_ups: float
    lost_replicas: int
    curve: tuple[Sample, ...]


@dataclass(frozen=True)
class Scenario:
    """The conditions that all candidates share."""

    traces: Sequence[Trace]
    """Traces of one file or one rate, with different random draws."""
    costs: CostModel
    scheduling: str
    """Name of the engine's scheduling policy in the config."""
    cluster: ClusterParams

    @property
    def mean_busy(self) -> float:
        """Mean number of replicas that the first trace keeps busy."""
        trace = self.traces[0]
        table = costs_of(self.costs, trace.kinds)
        work_s = sum(table[kind].solo_s for kind in trace.kinds)
        return work_s / max(1.0, trace.duration_s)

    def simulate(self, candidate: Candidate) -> Row:
        """Simulate a candidate on all traces, and average the results."""
        outcomes = [self.simulator(candidate, number).run() for number in range(len(self.traces))]
        return _row(candidate, outcomes)

    def simulator(
        self, candidate: Candidate, number: int = 0, pool: NodePool | None = None
    ) -> Simulator:
        """Build the simulator of a candidate on one of the traces."""
        return Simulator(
            self.traces[number],
            self.costs,
            partial(new_policy, self.scheduling, self.cluster.slo_scale),
            candidate.scaler(),
            replace(self.cluster, seed=self.cluster.seed + number),
            candidate.initial_replicas,
            pool,
        )


def _row(candidate: Candidate, outcomes: Sequence[SimulationOutcome]) -> Row:
    p50_s, p95_s = wait_quantiles(outcomes)
    requests = max(1, sum(outcome.requests for outcome in outcomes))
    samples = outcomes[0].samples
    return Row(
        candidate.family,
        candidate.label,
        sum(outcome.on_time for outcome in outcomes) / requests,
        sum(outcome.rejected for outcome in outcomes) / requests,
        statistics.mean(outcome.gpu_hours for outcome in outcomes),
        statistics.mean(outcome.work_s / 3_600 for outcome in outcomes),
        p50_s,
        p95_s,
        max((s.running for o in outcomes for s in o.samples), default=candidate.initial_replicas),
        statistics.mean(outcome.scale_ups for outcome in outcomes),
        sum(outcome.lost_replicas for outcome in outcomes),
        tuple(samples[:: max(1, len(samples) // CURVE_POINTS)]),
    )


def wait_quantiles(outcomes: Sequence[SimulationOutcome]) -> tuple[float, float]:
    """Return the 50th and the 95th percentile of the waits of all requests, in seconds."""
    waits_s = [wait_s for outcome in outcomes for wait_s in outcome.waits_s]
    if len(waits_s) < 2:  # too few for `statistics.quantiles`
        return sum(waits_s), sum(waits_s)
    cuts = statistics.quantiles(waits_s, n=20, method="inclusive")
    return cuts[9], cuts[18]


def candidates(
    ours: ScalingParams, families: Sequence[Family | Literal["configured"]], mean_busy: float
) -> Iterator[Candidate]:
    """Yield the candidates: this policy and variants, a sweep of Serve's default, fixed sizes.

    ``mean_busy``: replicas that the trace keeps busy on average.
    """
    bounds = {"min_replicas": ours.min_replicas, "max_replicas": ours.max_replicas}
    if {"work", "configured"} & set(families):
        yield Candidate("work", "by work, as configured", ours)
    if "work" in families:
        for utilization, drain_s, spare in itertools.product(
            (0.7, 0.8, 0.9, 0.95, 1.0), (30.0, 60.0, 120.0, 300.0), (0, 1)
        ):
            yield Candidate(
                "work",
                f"by work, utilization {utilization:g}, drain {drain_s:g} s, spare {spare}",
                replace(
                    ours,
                    target_utilization=utilization,
                    target_drain_s=drain_s,
                    spare_replicas=spare,
                ),
            )
    if "count" in families:
        shipped = QueueParams(**bounds)
        yield Candidate("count", "by count, as shipped", shipped)
        for ongoing, up_s, down_s in itertools.product(
            (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0),
            (0.0, 10.0, 30.0),
            (30.0, 60.0, 120.0, 300.0, 600.0),
        ):
            yield Candidate(
                "count",
                f"by count, {ongoing:g} ongoing, up {up_s:g} s, down {down_s:g} s",
                replace(
                    shipped,
                    target_ongoing_requests=ongoing,
                    upscale_delay_s=up_s,
                    downscale_delay_s=down_s,
                ),
            )
    if "fixed" in families:
        sizes = {max(1, round(mean_busy * factor)) for factor in (0.75, 1, 1.25, 1.5, 2, 2.5, 3)}
        for size in sorted(sizes):
            yield Candidate("fixed", f"{size} replicas, fixed", size)


_scenario: Scenario


def _take(scenario: Scenario) -> None:
    global _scenario
    _scenario = scenario


def _simulate(candidate: Candidate) -> Row:
    return _scenario.simulate(candidate)


def compare(
    scenario: Scenario, tried: Sequence[Candidate], on_done: Callable[[Row], object]
) -> list[Row]:
    """Simulate all candidates on all cores. Results keep their order."""
    if len(tried) == 1:
        rows = [scenario.simulate(tried[0])]
        on_done(rows[0])
        return rows
    # Forked, so that a trace of millions is not copied for each.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(os.cpu_count(), context, _take, (scenario,)) as pool:
        rows = []
        for row in pool.map(_simulate, tried):
            rows.append(row)
            on_done(row)
        return rows


def cheapest(rows: Sequence[Row], family: Family, slo_share: float) -> Row | None:
    """Return the candidate of a family with the fewest GPU-hours that meets the SLO."""
    good = [row for row in rows if row.family == family and row.attainment >= slo_share]
    return min(good, key=lambda row: row.gpu_hours, default=None)


def front(rows: Sequence[Row], family: Family) -> list[Row]:
    """Return the Pareto front of a family by attainment and GPU-hours, cheapest first."""
    best: list[Row] = []
    ours = (row for row in rows if row.family == family)
    for row in sorted(ours, key=lambda row: (row.gpu_hours, -row.attainment)):
        if not best or row.attainment > best[-1].attainment:
            best.append(row)
    return best


def table(rows: Sequence[Row], price_per_gpu_hour: float | None) -> str:
    """Format the results, one per line."""
    width = max(len(row.label) for row in rows)
    heading = (
        f"{'':<{width}} {'in time':>8} {'rejected':>8} {'GPU-hours':>10} {'busy':>6}"
        f" {'p50':>8} {'p95':>8} {'most':>5} {'ups':>4}"
    )
    lines = [heading + ("" if price_per_gpu_hour is None else f" {'cost':>10}")]
    for row in rows:
        busy = row.work_hours / row.gpu_hours if row.gpu_hours else 0.0
        line = (
            f"{row.label:<{width}} {row.attainment:>8.1%} {row.rejected:>8.1%}"
            f" {row.gpu_hours:>10.2f} {busy:>6.0%} {row.p50_s:>6.1f} s {row.p95_s:>6.1f} s"
            f" {row.most_replicas:>5} {row.scale_ups:>4.0f}"
        )
        if price_per_gpu_hour is not None:
            line += f" {row.gpu_hours * price_per_gpu_hour:>10.2f}"
        lines.append(line)
    return "\n".join(lines)


def shown(rows: Sequence[Row], slo_share: float) -> list[Row]:
    """Select the results to print: as configured, as shipped, and the front of each family."""
    lines = [row for row in rows if row.label.endswith(("as configured", "as shipped"))]
    for family in ("work", "count"):
        best = cheapest(rows, family, slo_share)
        lines += [row for row in front(rows, family) if row.attainment >= slo_share - 0.1]
        lines += [] if best is None else [best]
    lines += [row for row in rows if row.family == "fixed"]
    return list({row.label: row for row in lines}.values())


def verdict(rows: Sequence[Row], slo_share: float) -> str:
    """Compare this policy's cost with Serve's default, in a line or two."""
    lines = []
    best = {family: cheapest(rows, family, slo_share) for family in NAMES}
    shipped = next((row for row in rows if row.label.endswith("as shipped")), None)
    ours = next((row for row in rows if row.label.endswith("as configured")), None)
    for name, row in (("as configured", ours), ("at its best", best["work"])):
        if row is None:
            continue
        parts = [
            f"{row.gpu_hours / other.gpu_hours:.2f} of {what}"
            for what, other in (
                ("the best by count", best["count"]),
                ("by count as shipped", shipped),
                ("the best fixed size", best["fixed"]),
            )
            if other is not None and other.gpu_hours
        ]
        lines.append(
            f"by work {name}: {row.attainment:.1%} in time for {row.gpu_hours:.2f} GPU-hours"
            + (": " + ", ".join(parts) if parts else "")
        )
    for family, row in best.items():
        if row is None and any(one.family == family for one in rows):
            lines.append(f"no setting of {NAMES[family]} has {slo_share:.0%} in time")
    return "\n".join(lines)


def as_json(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Convert the results to JSON values, without the curves."""
    # The key ``refused`` is older than the field's name, and readers of the file have it.
    names = {"rejected": "refused"}
    return [
        {names.get(key, key): value for key, value in asdict(row).items() if key != "curve"}
        for row in rows
    ]
