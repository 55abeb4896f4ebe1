"""The longest duration of a request, and the shutdown time that a replica needs for its requests.

Pure functions of the configuration. Serve's deployments are built with them, and the doctor
compares them with the shutdown time that a manifest gives its pods.
"""

from serve_app.config.models import AppConfig

GRACE_S = 10.0
"""Time from the longest request to the end of a stopping replica, in seconds."""


def longest_requests_s(config: AppConfig) -> dict[str, float]:
    """Return the longest request of each deployment, in seconds.

    In a gateway, a request may first wait for a replica.
    """
    deadline_s = config.engine.limits.max_deadline_s
    return {"Generator": deadline_s, "Gateway": config.gateway.max_hold_s + deadline_s}


def graceful_shutdown_timeouts_s(config: AppConfig) -> dict[str, float]:
    """Return the shutdown timeout of each deployment, in seconds. A Serve config may change it."""
    return {name: longest_s + GRACE_S for name, longest_s in longest_requests_s(config).items()}
