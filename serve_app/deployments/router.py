"""The request routers: they draw several replicas and take the one with the fewest requests.

Serve's own router draws two. Requests differ a hundredfold in cost, so two counts tell little. More
counts tell more, and cost nothing while the caller knows them from its own requests. Every gateway
has a router of its own. Serve sends it this module by value.
"""

import asyncio
import random
import time
from typing import TYPE_CHECKING, Any

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.request_router import (
    FIFOMixin,
    LocalityMixin,
    PendingRequest,
    RequestRouter,
    RunningReplica,
)

if TYPE_CHECKING:
    from ray.serve._private.common import DeploymentID

CHOICES = 8
"""Replicas that are compared. Unknown counts are requested from all of them at once."""

GATEWAY_WITHIN_S = 30.0
"""Longest wait for a gateway. It loads no model, so it starts in seconds once it has a place.

Without a place, its start cannot be predicted: an answer is better than a longer wait."""


class ShortestOfSeveral(LocalityMixin, FIFOMixin, RequestRouter):
    """A router that draws `CHOICES` replicas; `RequestRouter` takes the least busy one."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Draw replicas in random order, because the first of equal ones is taken."""
        nearby = self.apply_locality_routing(pending_request)
        drawn = random.sample(tuple(nearby), min(CHOICES, len(nearby)))
        return [[self.curr_replicas[replica] for replica in drawn]]


class NoGateway(DeploymentUnavailableError):
    """No gateway accepted a request in time. Serve's proxy answers with a 503."""

    def __init__(self, deployment_id: "DeploymentID", hold_s: float) -> None:
        super().__init__(deployment_id)
        self._hold_s = hold_s

    def __str__(self) -> str:
        return self.message

    @property
    def message(self) -> str:
        return f"no gateway accepted the request within {self._hold_s:g} s."


class GatewayRouter(ShortestOfSeveral):
    """The router of Serve's proxies, which reject a request that no gateway accepts in time.

    The limit ends when a gateway accepts the request. It cuts no generation and no stream.
    """

    def initialize_state(self, *, hold_s: float = GATEWAY_WITHIN_S, **others: Any) -> None:
        """Set how long a request may wait. Serve calls it with ``request_router_kwargs``."""
        self._hold_s = hold_s

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """Wait for a replica; a retry after a rejection has the rest of the time.

        `choose_replicas`, which is public, is not called while there is no replica.
        """
        waited_s = time.time() - pending_request.created_at
        try:
            async with asyncio.timeout(max(0.0, self._hold_s - waited_s)):
                return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        except TimeoutError:
            raise NoGateway(self._deployment_id, self._hold_s) from None
