"""What the pages of docs/ may call, in double braces; mkdocs-macros loads this module."""

from typing import Any

from tools.docs import tables
from tools.docs.models import family_table, model_table
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
    tables.engine_table,
    tables.engine_details_table,
    tables.mix_table,
    tables.scheduler_table,
    tables.speed_table,
    tables.cold_start_table,
    tables.streaming_table,
    tables.overload_table,
    tables.plan_table,
    tables.routing_table,
    tables.autoscaling_table,
    tables.steadiness_table,
    tables.observability_table,
    family_table,
    model_table,
    *REFERENCE,
)


def define_env(env: Any) -> None:
    """Register the macros; ``env`` is mkdocs-macros' environment."""
    for macro in MACROS:
        env.macro(macro)
