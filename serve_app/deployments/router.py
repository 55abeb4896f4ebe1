"""The request routers: they draw several replicas and take the one with the fewest requests.

Serve's own router draws two. Requests differ a hundredfold in cost, so two counts tell little. More
counts tell more, and cost nothing while the caller knows them from its own requests. Every gateway
has a router of its own. Serve sends it this module by value.

Requests with a LoRA adapter go to the replica that has it, unless that one is much busier than the
others. Every gateway orders the replicas by the same hashes of the adapter's name, and takes the
first one that is not over its share of the requests. So an adapter stays at few replicas without a
message between gateways. The method is rendezvous hashing (Thaler and Ravishankar, 1998) with
bounded loads (Mirrokni, Thorup and Zadimoghaddam, "Consistent Hashing with Bounded Loads", 2018).
"""

import asyncio
import hashlib
import math
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
    from ray.serve._private.common import DeploymentID, RequestMetadata

CHOICES = 8
"""Replicas that are compared. Unknown counts are requested from all of them at once."""

MOST_OF_MEAN = 1.25
"""Requests at which a replica is passed over for an adapter, as a multiple of their mean number."""

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


class AdapterRouter(ShortestOfSeveral):
    """The router of the generators."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Choose the replica for the request's adapters, or draw replicas if it has none."""
        name = _adapters_of(pending_request)
        if not name or not self.curr_replicas:
            return await super().choose_replicas(candidate_replicas, pending_request)
        replicas = sorted(
            self.curr_replicas.values(), key=lambda one: _hash(name, one.replica_id.unique_id)
        )
        lengths = [self.replica_queue_len_cache.get(one.replica_id) or 0 for one in replicas]
        most = math.ceil(MOST_OF_MEAN * (sum(lengths) + 1) / len(lengths))
        chosen = next(one for one, length in zip(replicas, lengths, strict=True) if length < most)
        others = [one for one in replicas if one is not chosen]
        return [[chosen], others] if others else [[chosen]]

    def _get_pending_request_matching_metadata(
        self, request_metadata: "RequestMetadata | None" = None
    ) -> PendingRequest | None:
        """Give the chosen replica to the request that it was chosen for, if that has adapters.

        Others get replicas in the order of their arrival.
        """
        found = self._get_pending_request_matching_internal_request_id(request_metadata)
        return found if _adapters_of(found) else None


def _adapters_of(request: PendingRequest | None) -> str:
    """Return the names of the adapters that a call of the generator needs, as one text."""
    params = request.args[0] if request is not None and request.args else None
    return " ".join(name for name, _ in getattr(params, "lora", ()))


def _hash(name: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{name} {replica}".encode(), digest_size=8).digest()


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
