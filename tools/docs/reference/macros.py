"""The functions of the reference pages that pages may call."""

from collections.abc import Callable

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

REFERENCE: tuple[Callable[..., str], ...] = (
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
