"""The longest that a request may take, and that a replica waits for its requests before it ends.

Pure, over the application's configuration: Serve's deployments are built with it, and the doctor
compares it with what a manifest grants its pods.
"""

from serve_app.config.models import AppConfig

GRACE_S = 10.0
"""Between the longest that a request may take and the end of a replica that is to go away."""


def longest_requests_s(config: AppConfig) -> dict[str, float]:
    """By deployment, in seconds. A gateway may hold a request before a generator takes it."""
    deadline_s = config.engine.limits.max_deadline_s
    return {"Generator": deadline_s, "Gateway": config.gateway.max_hold_s + deadline_s}


def graceful_shutdown_timeouts_s(config: AppConfig) -> dict[str, float]:
    """By deployment, in seconds, unless the Serve config has others."""
    return {name: longest_s + GRACE_S for name, longest_s in longest_requests_s(config).items()}
