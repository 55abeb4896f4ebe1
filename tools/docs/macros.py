"""What the pages of docs/ may call, in double braces; mkdocs-macros loads this module."""

from typing import Any

from tools.docs import scaling, tables
from tools.docs.busy_share import busy_share_table
from tools.docs.clients import (
    client_errors_table,
    client_versions,
    clients_table,
    front_ends_table,
)
from tools.docs.extrapolation import (
    extrapolation_deadlines_table,
    extrapolation_families_table,
    extrapolation_table,
)
from tools.docs.first_day import first_day_table
from tools.docs.models import config_table, family_table, memory_table
from tools.docs.overhead import overhead_table
from tools.docs.reference.macros import REFERENCE
from tools.docs.results import results

MACROS = (
    results,
    tables.percent,
    tables.in_time,
    tables.row,
    tables.hardware,
    tables.source,
    tables.cheapest,
    tables.peers_table,
    tables.peers_targets_table,
    tables.engine_table,
    tables.engine_details_table,
    tables.mix_table,
    tables.scheduler_table,
    tables.speed_table,
    tables.cold_start_table,
    tables.streaming_table,
    tables.layers_ms,
    tables.layers_table,
    overhead_table,
    tables.overload_table,
    scaling.plan_table,
    scaling.routing_table,
    scaling.autoscaling_table,
    scaling.steadiness_table,
    scaling.few_gpus_table,
    busy_share_table,
    tables.observability_table,
    extrapolation_table,
    extrapolation_deadlines_table,
    extrapolation_families_table,
    first_day_table,
    family_table,
    config_table,
    memory_table,
    clients_table,
    front_ends_table,
    client_errors_table,
    client_versions,
    *REFERENCE,
)


def define_env(env: Any) -> None:
    """Register the macros; ``env`` is mkdocs-macros' environment."""
    for macro in MACROS:
        env.macro(macro)
