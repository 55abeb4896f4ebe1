"""The longest duration of a request, and the shutdown time that a replica needs for its requests.

Pure functions of the configuration. Serve's deployments are built with them, and the doctor
compares them with the shutdown time that a manifest gives its pods.
"""

from serve_app.config.deployment_names import GATEWAY
from serve_app.config.models import AppConfig

GRACE_S = 10.0
"""Time from the longest request to the end of a stopping replica, in seconds."""


def longest_requests_s(config: AppConfig) -> dict[str, float]:
    """Return the longest request of each deployment, in seconds.

    In a gateway, a request may first wait for a replica.
    """
    deadlines_s = [one.engine.limits.max_deadline_s for one in config.each_model()]
    longest_s = dict(zip(config.generators, deadlines_s, strict=True))
    return {**longest_s, GATEWAY: config.gateway.max_hold_s + max(deadlines_s)}


def graceful_shutdown_timeouts_s(config: AppConfig) -> dict[str, float]:
    """Return the shutdown timeout of each deployment, in seconds. A Serve config may change it."""
    return {name: longest_s + GRACE_S for name, longest_s in longest_requests_s(config).items()}
