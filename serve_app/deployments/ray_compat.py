"""Every use of Ray that its documentation does not cover, read in Ray 2.60.0.

Read these places again in Ray's source before a new minor version of Ray is allowed. Besides them,
Serve calls `Gateway.__serve_build_asgi_app__`, `Generator.record_autoscaling_stats` and
`Generator.check_health` by name, and both ``__del__`` methods when a replica stops. Its
proxies call `GatewayRouter._choose_replica_for_request` until a replica accepts the request. The
routing tasks of `AdapterRouter` call its `_get_pending_request_matching_metadata`.
"""

from ipaddress import ip_address
from typing import Any

from ray.exceptions import TaskCancelledError
from ray.serve._private.common import DeploymentStatusTrigger, ReplicaState
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentDetails
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REPLICA_STATES = tuple(state.value for state in ReplicaState)
"""Values of `ReplicaDetails.state`. The public schema has them as an enum of a private module."""

STARTUP_FAILED = DeploymentStatusTrigger.REPLICA_STARTUP_FAILED
"""`DeploymentDetails.status_trigger` when as many starts as Serve tries have failed. Its status is
DEPLOY_FAILED for a new deployment, and UNHEALTHY for one that scaled up from zero."""


async def deployment_details(app: str, deployment: str) -> DeploymentDetails:
    """Ask Serve's controller for the replicas of one deployment.

    ``serve.status()`` is public, but blocks and returns counts only, without start times.

    Raises:
        RayError, RayServeException: if the controller does not answer.
    """
    client: Any = _get_global_client()
    details: DeploymentDetails = await client._controller.get_deployment_details.remote(
        app, deployment
    )
    return details


def address_beyond_loopback() -> str | None:
    """Return the address of Serve's proxies, or ``None`` if only this machine can reach it."""
    client: Any = _get_global_client()
    host: str = client.http_config.host or ""
    try:
        local = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        local = False  # a name
    return None if local else host or "every address"


async def call_all_replicas(deployment: DeploymentHandle[Any], method: str) -> list[Any]:
    """Call a method of all running replicas; return one result object for each.

    ``results_async()`` is public, but drops all results when one is late. A result object has
    ``get_async()`` and ``cancel()``.

    Raises:
        RayServeException: if the deployment has no replica.
    """
    response: Any = deployment.broadcast(method)
    results: list[Any] = await response._fetch_replica_results_async()
    return results


def handle_to(deployment: str, app: str) -> DeploymentHandle[Any]:
    """Make a handle to a deployment that may not be ready yet; its constructor is undocumented."""
    return DeploymentHandle(deployment, app)


class CancelledAsDisconnect:
    """ASGI middleware that turns Serve's cancellation into a disconnect.

    ``receive`` of Serve raises `TaskCancelledError` when its proxy drops the call of a client that
    has gone away. ASGI has the message ``http.disconnect`` for that.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def message() -> Message:
            try:
                return await receive()
            except TaskCancelledError:
                return {"type": "http.disconnect"}

        await self._app(scope, message, send)
