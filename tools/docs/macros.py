"""What the pages of docs/ may call, in double braces; mkdocs-macros loads this module."""

from collections.abc import Callable
from typing import Any

from tools.docs.reference.cli import command_line
from tools.docs.reference.configuration import (
    api_keys,
    configuration,
    environment_variables,
    scaling_policy,
)
from tools.docs.reference.errors import error_classes, errors_table
from tools.docs.reference.http_api import http_api, other_paths, schemas, stream_events
from tools.docs.reference.metrics import labels_table, metrics_table
from tools.docs.reference.modules import modules
from tools.docs.results import results

MACROS: tuple[Callable[..., Any], ...] = (
    results,
    api_keys,
    command_line,
    configuration,
    environment_variables,
    error_classes,
    errors_table,
    http_api,
    labels_table,
    metrics_table,
    modules,
    other_paths,
    scaling_policy,
    schemas,
    stream_events,
)


def define_env(env: Any) -> None:
    """Register the macros; ``env`` is mkdocs-macros' environment."""
    for macro in MACROS:
        env.macro(macro)
