"""Sizes a cluster before it is bought: one trace under many scaling policies, side by side."""

import itertools
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from serve_app.autoscaling.params import BOUNDS, read_scaling_params
from serve_app.autoscaling.policy import ScalingParams
from serve_app.config import foreign_policy, policy_kwargs, read_autoscaling
from serve_app.engine.scheduling.cost import CostModel
from serve_app.engine.scheduling.policies import POLICIES
from serve_app.errors import ConfigError
from serve_app.planner.serve_policy import QueueParams
from serve_app.planner.simulator import (
    ByCount,
    ByWork,
    ClusterParams,
    Fixed,
    Outcome,
    Sample,
    Scaler,
    Simulator,
)
from serve_app.planner.simulator import costs as costs_of
from serve_app.planner.trace import Trace, drawn, parse_mix, poisson, read_arrivals

Family = Literal["work", "count", "fixed"]
"""This project's policy, Ray Serve's default one, or always as many."""

NAMES: dict[Family, str] = {
    "work": "by work",
    "count": "by count (Ray Serve's default)",
    "fixed": "fixed size",
}

CURVE_POINTS = 400
"""That are kept of a run, to be drawn."""


@dataclass(frozen=True)
class Candidate:
    """One way to scale."""

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
    """What a candidate did."""

    family: Family
    label: str
    attainment: float
    """Share of all requests that were done before their deadlines."""
    refused: float
    """Share of all requests."""
    gpu_hours: float
    work_hours: float
    """Of all requests, each alone: what no policy can go below."""
    p50_s: float
    p95_s: float
    """From arrival to end."""
    most_replicas: int
    scale_ups: float
    lost_replicas: int
    curve: tuple[Sample, ...]


@dataclass(frozen=True)
class Scenario:
    """What all candidates are tried on."""

    traces: Sequence[Trace]
    """Of one file or one rate; what they ask for, and all else that is drawn, differs."""
    costs: CostModel
    scheduling: str
    """The engine's, by its name in the config."""
    cluster: ClusterParams

    @property
    def mean_busy(self) -> float:
        """Replicas that the first trace keeps busy on average."""
        trace = self.traces[0]
        table = costs_of(self.costs, trace.kinds)
        work_s = sum(table[kind].solo_s for kind in trace.kinds)
        return work_s / max(1.0, trace.duration_s)

    def simulate(self, candidate: Candidate) -> Row:
        """Over all traces; means of what they gave."""
        outcomes = [
            Simulator(
                trace,
                self.costs,
                POLICIES[self.scheduling],
                candidate.scaler(),
                replace(self.cluster, seed=self.cluster.seed + number),
                candidate.initial_replicas,
            ).run()
            for number, trace in enumerate(self.traces)
        ]
        return _row(candidate, outcomes)


def _row(candidate: Candidate, outcomes: Sequence[Outcome]) -> Row:
    waits_s = [wait_s for outcome in outcomes for wait_s in outcome.waits_s] or [0.0, 0.0]
    cuts = statistics.quantiles(waits_s, n=20, method="inclusive")
    requests = max(1, sum(outcome.requests for outcome in outcomes))
    samples = outcomes[0].samples
    return Row(
        candidate.family,
        candidate.label,
        sum(outcome.on_time for outcome in outcomes) / requests,
        sum(outcome.refused for outcome in outcomes) / requests,
        statistics.mean(outcome.gpu_hours for outcome in outcomes),
        statistics.mean(outcome.work_s / 3_600 for outcome in outcomes),
        cuts[9],
        cuts[18],
        max((s.running for o in outcomes for s in o.samples), default=candidate.initial_replicas),
        statistics.mean(outcome.scale_ups for outcome in outcomes),
        sum(outcome.lost_replicas for outcome in outcomes),
        tuple(samples[:: max(1, len(samples) // CURVE_POINTS)]),
    )


def read_costs(path: Path, max_batch_size: int) -> CostModel:
    """The step times in a file that an engine wrote to ``engine.profile_path``, or one like it.

    Raises:
        ConfigError: if it is none.
    """
    costs = CostModel(max_batch_size)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        costs.add_json(content.get("found", content)["sizes"])
        for size, call_s in costs.call_s.items():
            rest_s = costs.encode_s[size], costs.decode_s[size]
            if not min(call_s.values()) > 0 or not min(rest_s) >= 0:
                raise ValueError(f"the times of {size[0]}x{size[1]} are none")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is no table of step times ({error!r}); write one by starting an engine with "
            "engine.profile_path and engine.warmup_sizes_px, or see configs/costs/."
        ) from None
    if not costs.call_s:
        raise ConfigError(f"{path} has no size.")
    return costs


def read_scaling(path: Path, max_replicas: int | None) -> ScalingParams:
    """How the config file scales ``Generator``; one replica, if it does not say.

    Raises:
        ConfigError: if the file, its bounds or the policy's arguments are wrong.
    """
    autoscaling = read_autoscaling(path, "Generator")[0]
    fewest, most = _bounds(autoscaling)
    if not (isinstance(fewest, int) and isinstance(most, int)):
        raise ConfigError(f"{path}: {' and '.join(BOUNDS)} must be whole numbers.")
    if max_replicas is not None:
        fewest, most = min(fewest, max_replicas), max_replicas
    knobs = read_scaling_params(policy_kwargs(autoscaling))
    try:
        return replace(knobs, min_replicas=fewest, max_replicas=most)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}.") from None


def not_simulated(path: Path) -> list[str]:
    """In which way the config file scales ``Generator`` otherwise than `read_scaling` says."""
    autoscaling = read_autoscaling(path, "Generator")[0]
    notes = []
    fewest, most = _bounds(autoscaling)
    other = foreign_policy(autoscaling)
    if fewest != most and not (autoscaling.get("policy") or {}).get("policy_function"):
        other = "Ray Serve's default policy"
    if other is not None:
        notes.append(
            f"it scales Generator by {other}: what is called 'by work, as configured' here is this "
            "project's policy with its defaults, within those bounds."
        )
    notes += [
        f"autoscaling_config.{name} is not simulated."
        for name in ("downscale_to_zero_delay_s", "upscaling_factor", "downscaling_factor")
        if name in autoscaling
    ]
    return notes


def _bounds(autoscaling: Mapping[str, Any]) -> tuple[Any, Any]:
    fewest, most = (autoscaling.get(name, 1) for name in BOUNDS)
    return fewest, most


def arrivals(
    path: Path | None,
    rate: float | None,
    duration_s: float,
    mix: str | None,
    mix_at_end: str | None,
    stretch: float,
    share: float,
    seed: int,
) -> Trace:
    """From a file, or at a steady rate.

    Raises:
        ConfigError: if the file is wrong, or nobody says what requests ask for.
    """
    kinds = None
    if path is not None:
        at_s, kinds = read_arrivals(path, stretch, share, seed)
    else:
        assert rate is not None
        at_s = poisson(rate, duration_s, seed)
    if kinds is not None:
        if mix is not None or mix_at_end is not None:
            raise ConfigError(
                f"{path} says what requests ask for: leave out --mix and --mix-at-end."
            )
        return Trace(at_s, kinds)
    if mix is None:
        raise ConfigError("say what requests ask for with --mix, such as 1024x1024/25:1.")
    return drawn(at_s, parse_mix(mix), None if mix_at_end is None else parse_mix(mix_at_end), seed)


def parse_families(names: Sequence[str]) -> list[Family | Literal["configured"]]:
    """Raises `ConfigError` for a name that is none."""
    known = ("work", "count", "fixed", "configured")
    for name in names:
        if name not in known:
            raise ConfigError(f"--policy is {name!r}; known are {', '.join(known)}.")
    return list(names)  # type: ignore[arg-type]


def drawing() -> Callable[[Sequence[Row], float, str, Path], None]:
    """What draws a chart. Raises `ConfigError` without matplotlib."""
    try:
        from serve_app.planner.chart import draw
    except ImportError:
        raise ConfigError(
            "--chart needs matplotlib: pip install 'diffusion-serve[plan]'."
        ) from None
    return draw


def candidates(
    ours: ScalingParams, families: Sequence[Family | Literal["configured"]], mean_busy: float
) -> Iterator[Candidate]:
    """What to compare: ours and its neighbours, Serve's default swept, fixed sizes.

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
    """Simulate them all, on all cores; in their order."""
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
    """Of a family: the fewest GPU-hours with which so many requests are in time."""
    good = [row for row in rows if row.family == family and row.attainment >= slo_share]
    return min(good, key=lambda row: row.gpu_hours, default=None)


def front(rows: Sequence[Row], family: Family) -> list[Row]:
    """Those of a family that no other beats in both attainment and GPU-hours, cheapest first."""
    best: list[Row] = []
    ours = (row for row in rows if row.family == family)
    for row in sorted(ours, key=lambda row: (row.gpu_hours, -row.attainment)):
        if not best or row.attainment > best[-1].attainment:
            best.append(row)
    return best


def table(rows: Sequence[Row], price_per_gpu_hour: float | None) -> str:
    """As text, a line each."""
    width = max(len(row.label) for row in rows)
    heading = (
        f"{'':<{width}} {'in time':>8} {'refused':>8} {'GPU-hours':>10} {'busy':>6}"
        f" {'p50':>8} {'p95':>8} {'most':>5} {'ups':>4}"
    )
    lines = [heading + ("" if price_per_gpu_hour is None else f" {'cost':>10}")]
    for row in rows:
        busy = row.work_hours / row.gpu_hours if row.gpu_hours else 0.0
        line = (
            f"{row.label:<{width}} {row.attainment:>8.1%} {row.refused:>8.1%}"
            f" {row.gpu_hours:>10.2f} {busy:>6.0%} {row.p50_s:>6.1f} s {row.p95_s:>6.1f} s"
            f" {row.most_replicas:>5} {row.scale_ups:>4.0f}"
        )
        if price_per_gpu_hour is not None:
            line += f" {row.gpu_hours * price_per_gpu_hour:>10.2f}"
        lines.append(line)
    return "\n".join(lines)


def shown(rows: Sequence[Row], slo_share: float) -> list[Row]:
    """What is worth a line: as configured, as shipped, and the front of each family."""
    lines = [row for row in rows if row.label.endswith(("as configured", "as shipped"))]
    for family in ("work", "count"):
        best = cheapest(rows, family, slo_share)
        lines += [row for row in front(rows, family) if row.attainment >= slo_share - 0.1]
        lines += [] if best is None else [best]
    lines += [row for row in rows if row.family == "fixed"]
    return list({row.label: row for row in lines}.values())


def verdict(rows: Sequence[Row], slo_share: float) -> str:
    """What ours costs against Serve's default, in a line or two."""
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
    """Without the curves."""
    return [{key: value for key, value in asdict(row).items() if key != "curve"} for row in rows]
