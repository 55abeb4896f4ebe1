"""How many replicas of a deployment there are and how many are coming, by Serve's controller."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError
from ray.serve._private.common import ReplicaState
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import DeploymentDetails

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
"""The controller is asked at most so often, and only while somebody wants to know."""

ANSWER_WITHIN_S = 2.0


@dataclass(frozen=True)
class Fleet:
    """The replicas of a deployment at one time."""

    running: int
    coming: int
    """Starting, or not even that while there is no node for them."""
    ready_in_s: float | None
    """Until the next of them should run; none if none is starting, or none was ever seen to."""
    target: int = 0
    """As many as there should be."""
    states: Mapping[str, int] = field(default_factory=dict)
    """How many are in each of Serve's states, in lower case."""


async def ask_controller(app: str, deployment: str) -> DeploymentDetails:
    client: Any = _get_global_client()
    details: DeploymentDetails = await client._controller.get_deployment_details.remote(
        app, deployment
    )
    return details


class Replicas:
    """Looks when asked, and learns how long replicas take to start."""

    def __init__(self, ask: Callable[[], Awaitable[DeploymentDetails]]) -> None:
        self._ask = ask
        self._lock = asyncio.Lock()
        self._looked_at: float | None = None
        self._fleet = Fleet(1, 0, None)  # as good as anything before the first answer
        self._starting: dict[str, float] = {}  # since when, in Unix time
        self._cold_start_s: float | None = None

    async def look(self) -> Fleet:
        """As it was a second ago at most; when the controller does not answer, as it last said."""
        async with self._lock:
            now = time.monotonic()
            if self._looked_at is None or now - self._looked_at >= LOOK_EVERY_S:
                try:
                    async with asyncio.timeout(ANSWER_WITHIN_S):
                        self._fleet = self._seen(await self._ask(), time.time())
                except (RayError, RayServeException, TimeoutError) as error:
                    logger.warning("Serve's controller does not say what is starting: %r", error)
                self._looked_at = time.monotonic()
            return self._fleet

    def _seen(self, details: DeploymentDetails, now: float) -> Fleet:
        running = {replica.replica_id for replica in details.replicas if replica.state == "RUNNING"}
        for replica_id in running & self._starting.keys():
            self._cold_start_s = now - self._starting[replica_id]
        self._starting = {
            replica.replica_id: replica.start_time_s
            for replica in details.replicas
            if replica.state == "STARTING"
        }
        ready_in_s = None
        if self._starting and self._cold_start_s is not None:
            ready_in_s = max(0.0, min(self._starting.values()) + self._cold_start_s - now)
        coming = max(0, details.target_num_replicas - len(running))
        states = dict.fromkeys((state.value.lower() for state in ReplicaState), 0)
        states |= Counter(replica.state.lower() for replica in details.replicas)
        return Fleet(len(running), coming, ready_in_s, details.target_num_replicas, states)
