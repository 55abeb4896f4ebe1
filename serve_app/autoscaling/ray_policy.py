"""Adapts `policy` to Ray Serve's interface for autoscaling policies.

A Serve config names `WorkPolicy` as ``autoscaling_config.policy.policy_function``. Serve's
controller builds one whenever the deployment is deployed, and calls it about ten times a second.

Serve pickles this module by value where the application is built, and its imports by name. The
controller imports these once, from the package installed on the head, whatever is deployed later.
So this module imports nothing heavy and does no I/O.

While no replica runs and a request waits, Serve starts the first replica without calling a policy.
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
    PolicyState,
    ScalingParams,
    Start,
    Term,
    decide,
)
from serve_app.errors import ConfigError
from serve_app.metrics.autoscaling import (
    DECISIVE_TERM,
    FORECAST_REPLICAS,
    MEASURED_COLD_START,
    NEEDED_REPLICAS,
    RAY_GAUGES,
    WAITING,
    WANTED_REPLICAS,
)
from serve_app.protocol.load import ReplicaLoad
from serve_app.serve_log import log_through_serve

logger = logging.getLogger(__name__)

STALE_S = 10.0
"""Maximum age of a replica's report; more than the clocks of two nodes differ by."""

STALE_REPORTS = 3.0
"""The same in multiples of the reporting interval, where that is longer."""

SILENT_S = 60.0
"""Time without reports that is a fault, not a start or a short pause."""


class WorkPolicy:
    """The scaling policy as Serve's controller builds and calls it.

    ``scaling_params`` are the fields of `ScalingParams`, without the bounds.
    """

    def __init__(self, **scaling_params: float) -> None:
        log_through_serve()
        try:
            self._params = read_scaling_params(scaling_params)
        except ConfigError as error:
            # Not raised: Serve 2.60 would stay half deployed and not even report its status.
            self._params = ScalingParams()
            logger.error(
                "%s The policy uses its defaults until this is corrected. `diffusion-serve check` "
                "finds such errors before they are deployed.",
                error,
            )
        self.state = PolicyState()
        """State after the last decision."""
        self._wanted: int | None = None
        self._all_known_at: float | None = None
        self._gauges = _Gauges()

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas, and an empty state: the policy keeps its own."""
        params = replace(
            self._params,
            min_replicas=ctx.capacity_adjusted_min_replicas,
            max_replicas=ctx.capacity_adjusted_max_replicas,
        )
        load = load_of(ctx)
        decision, self.state = decide(load, params, _with_starts_of_serve(self.state, ctx))
        if decision.replicas != self._wanted:
            self._wanted = decision.replicas
            logger.info("%s/%s: %s", ctx.app_name, ctx.deployment_name, decision)
        self._warn_of_missing_reports(load, ctx)
        self._gauges.set(decision, ctx)
        return decision.replicas, {}

    def _warn_of_missing_reports(self, load: Load, ctx: AutoscalingContext) -> None:
        """Log once for each period of missing reports, in which the policy cannot scale down."""
        missing = load.running - len(load.reports)
        if not missing or self._all_known_at is None:
            self._all_known_at = load.at_s
        elif load.at_s - self._all_known_at > SILENT_S:
            self._all_known_at = math.inf
            logger.warning(
                "%s/%s: %d of %d replicas have sent no fresh load report for %.0f s. No replica is "
                "removed, and work waiting there is not counted. Check that they respond, and that "
                "the clocks of their nodes are within %.0f s of the head's.",
                ctx.app_name,
                ctx.deployment_name,
                missing,
                load.running,
                SILENT_S,
                STALE_S,
            )


def load_of(ctx: AutoscalingContext) -> Load:
    """Convert Serve's view of a deployment to the input of `decide`."""
    assert ctx.current_time is not None
    return Load(
        at_s=ctx.current_time,
        running=ctx.current_num_replicas,
        target=ctx.target_num_replicas,
        reports=list(_replicas(ctx)),
        queued_requests=ctx.total_queued_requests,
    )


def _replicas(ctx: AutoscalingContext) -> Iterator[ReplicaLoad]:
    """Yield the loads of running replicas with complete and fresh reports.

    Uses the last sample of each metric: Serve's own average spans ``look_back_period_s``.
    """
    assert ctx.current_time is not None
    assert ctx.config is not None
    oldest_at = ctx.current_time - max(STALE_S, STALE_REPORTS * ctx.config.metrics_interval_s)
    reported = ctx.raw_metrics or {}
    for replica in ctx.running_replicas:
        values = {}
        for field in fields(ReplicaLoad):
            series = reported.get(field.name, {}).get(replica)
            if series and series[-1].timestamp >= oldest_at and math.isfinite(series[-1].value):
                values[field.name] = series[-1].value
        if len(values) == len(fields(ReplicaLoad)) and values["throughput"] > 0:
            yield ReplicaLoad(**values)


def _with_starts_of_serve(state: PolicyState, ctx: AutoscalingContext) -> PolicyState:
    """Add the start of a first replica, which Serve decides: it is measured like any other."""
    at_s, target = ctx.last_scale_up_time, ctx.target_num_replicas
    if at_s is None or state.at_s is None or at_s <= state.at_s:
        return state
    if any(start.ready_at >= target for start in state.starts):
        return state  # decided by this policy
    return replace(state, starts=(*state.starts, Start(at_s, target)))


class _Gauges:
    """Gauges of the last decision, on Ray's metrics port: the controller has no other."""

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
