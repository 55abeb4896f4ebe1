"""The replies of Ray Serve's controller about the replicas of a deployment."""

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any


def replica(name: str, state: str = "RUNNING", start_time_s: float = 0.0) -> Any:
    """Return one replica as the controller lists it."""
    return SimpleNamespace(replica_id=name, state=state, start_time_s=start_time_s)


def deployment_status(
    *replicas: Any, target: int | None = None, trigger: str = "CONFIG_UPDATE_COMPLETED"
) -> Any:
    """Return the status of a deployment; its target is the number of its replicas by default."""
    target = len(replicas) if target is None else target
    return SimpleNamespace(
        replicas=list(replicas), target_num_replicas=target, status_trigger=trigger
    )


def always(status: Any) -> Callable[[], Awaitable[Any]]:
    """Return a query that always returns this status."""

    async def fetch() -> Any:
        return status

    return fetch
