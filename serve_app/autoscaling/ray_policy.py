"""What Ray Serve asks how many replicas there should be: `policy`, fed with Serve's figures.

A Serve config names `WorkPolicy` as ``autoscaling_config.policy.policy_function``. Serve makes one
of it, in its controller, whenever the deployment is deployed, and asks it ten times a second. It
pickles this module by value where the application is built, but what is imported here by name: the
controller, on the head, imports `policy` and the rest from the package that is installed there,
once, whatever is deployed later. So nothing heavy is imported here; and no I/O is done.

While no replica runs and a request waits, Serve starts the first one without asking.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, get_args

from ray.serve.config import AutoscalingContext
from ray.util.metrics import Gauge

from serve_app.autoscaling.params import read_scaling_params
from serve_app.autoscaling.policy import (
    Decision,
    Load,
    Memory,
    ReplicaLoad,
    ScalingParams,
    Start,
    Term,
    decide,
)
from serve_app.errors import ConfigError
from serve_app.metrics import (
    DECISIVE_TERM,
    FORECAST_REPLICAS,
    MEASURED_COLD_START,
    NEEDED_REPLICAS,
    RAY_GAUGES,
    WAITING,
    WANTED_REPLICAS,
)
from serve_app.serve_log import log_through_serve

logger = logging.getLogger(__name__)

STALE_S = 10.0
"""What a replica said longer ago is not known; more than the clocks of two nodes differ by."""

STALE_REPORTS = 3.0
"""The same in multiples of the interval between reports, where that is long."""

SILENT_S = 60.0
"""Replicas that say nothing for so long are a fault, and no start or hiccup."""


class WorkPolicy:
    """Scales a deployment by the work that waits; kept by Serve, called with its figures.

    ``knobs`` are the fields of `ScalingParams` but for the bounds.
    """

    def __init__(self, **knobs: float) -> None:
        log_through_serve()
        try:
            self._params = read_scaling_params(knobs)
        except ConfigError as error:
            # Not raised: Serve 2.60 would stay half deployed and answer no question about itself.
            self._params = ScalingParams()
            logger.error(
                "%s It scales by the defaults until that is corrected. `diffusion-serve check` "
                "finds such mistakes before they are deployed.",
                error,
            )
        self._memory = Memory()
        self._wanted: int | None = None
        self._all_known_at: float | None = None
        self._gauges = _Gauges()

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas, and nothing for Serve to keep."""
        params = replace(
            self._params,
            min_replicas=ctx.capacity_adjusted_min_replicas,
            max_replicas=ctx.capacity_adjusted_max_replicas,
        )
        load = load_of(ctx)
        decision, self._memory = decide(load, params, _with_starts_of_serve(self._memory, ctx))
        if decision.replicas != self._wanted:
            self._wanted = decision.replicas
            logger.info("%s/%s: %s", ctx.app_name, ctx.deployment_name, decision)
        self._complain(load, ctx)
        self._gauges.set(decision, ctx)
        return decision.replicas, {}

    def _complain(self, load: Load, ctx: AutoscalingContext) -> None:
        """Once for each time that it goes on with figures missing: it would not scale, and be
        silent."""
        missing = load.running - len(load.replicas)
        if not missing or self._all_known_at is None:
            self._all_known_at = load.at_s
        elif load.at_s - self._all_known_at > SILENT_S:
            self._all_known_at = math.inf
            logger.warning(
                "%s/%s: no figures, or old ones, of %d of %d replicas for %.0f s: none is given "
                "up, and what waits there is not seen. Do they answer, and are the clocks of their "
                "nodes within %.0f s of the head's?",
                ctx.app_name,
                ctx.deployment_name,
                missing,
                load.running,
                SILENT_S,
                STALE_S,
            )


def load_of(ctx: AutoscalingContext) -> Load:
    """What Serve knows of a deployment, as `decide` takes it."""
    assert ctx.current_time is not None
    return Load(
        at_s=ctx.current_time,
        running=ctx.current_num_replicas,
        target=ctx.target_num_replicas,
        replicas=list(_replicas(ctx)),
        queued_requests=ctx.total_queued_requests,
    )


def _replicas(ctx: AutoscalingContext) -> Iterator[ReplicaLoad]:
    """Those that run and have lately said what they do.

    Serve averages over ``look_back_period_s``; what counts is how it is now.
    """
    assert ctx.current_time is not None
    assert ctx.config is not None
    oldest_at = ctx.current_time - max(STALE_S, STALE_REPORTS * ctx.config.metrics_interval_s)
    said = ctx.raw_metrics or {}
    for replica in ctx.running_replicas:
        figures = {}
        for field in fields(ReplicaLoad):
            series = said.get(field.name, {}).get(replica)
            if series and series[-1].timestamp >= oldest_at and math.isfinite(series[-1].value):
                figures[field.name] = series[-1].value
        if len(figures) == len(fields(ReplicaLoad)) and figures["throughput"] > 0:
            yield ReplicaLoad(**figures)


def _with_starts_of_serve(memory: Memory, ctx: AutoscalingContext) -> Memory:
    """The start of the first replica is Serve's own, and tells how long a start takes as well."""
    at_s, target = ctx.last_scale_up_time, ctx.target_num_replicas
    if at_s is None or memory.at_s is None or at_s <= memory.at_s:
        return memory
    if any(start.to >= target for start in memory.starts):
        return memory  # it was decided here
    return replace(memory, starts=(*memory.starts, Start(at_s, target)))


class _Gauges:
    """The last decision as metrics: on Ray's port, for the controller has no other."""

    def __init__(self) -> None:
        self._gauges = {
            one: Gauge(one.name, one.documentation, tag_keys=one.labels) for one in RAY_GAUGES
        }

    def set(self, decision: Decision, ctx: AutoscalingContext) -> None:
        tags = {"application": ctx.app_name or "", "deployment": ctx.deployment_name}
        gauges, inputs = self._gauges, decision.inputs
        gauges[WANTED_REPLICAS].set(decision.replicas, tags)
        for by in ("arrivals", "backlog"):
            gauges[NEEDED_REPLICAS].set(inputs[f"by_{by}"], tags | {"by": by})
        for term in get_args(Term):
            gauges[DECISIVE_TERM].set(term == decision.term, tags | {"term": term})
        gauges[FORECAST_REPLICAS].set(inputs["forecast"], tags)
        gauges[WAITING].set(inputs["waiting_s"], tags)
        gauges[MEASURED_COLD_START].set(inputs["cold_start_s"], tags)
