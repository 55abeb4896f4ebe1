"""The retry time of an error, in the form that clients receive.

Errors carry ``retry_after_s`` in seconds; only this module rounds it and writes the header.
"""

import math
from typing import Any

from serve_app.errors import DiffusionServeError, NotFinite

DEFAULT_RETRY_S = 5.0
"""Retry time of an error that has none."""

_RETRYABLE = (429, 503)
"""Statuses with the header ``Retry-After``."""


def whole_seconds(retry_after_s: float | None) -> int:
    """Return a retry time in whole seconds: rounded up, at least one."""
    return max(1, math.ceil(DEFAULT_RETRY_S if retry_after_s is None else retry_after_s))


def retry_headers(error: DiffusionServeError) -> dict[str, str]:
    """Return the headers that state when, or whether, to retry."""
    if error.status in _RETRYABLE:
        return {"Retry-After": str(whole_seconds(error.retry_after_s))}
    if error.status < 500 or error.status == 504 or isinstance(error, NotFinite):
        # OpenAI's clients read it. A retry would fail again, or take as long again.
        return {"x-should-retry": "false"}
    return {}


def documented_headers(status: int) -> dict[str, Any]:
    """Describe the headers of an error response, for OpenAPI."""
    if status not in _RETRYABLE:
        return {}
    return {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds to wait."}}
