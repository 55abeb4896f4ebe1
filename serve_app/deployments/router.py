"""Which replica gets a request: the one with the fewest, of several that are drawn.

Serve's own router draws two. Requests differ a hundredfold in what they cost, so counts of two say
little; counts of more say more, and cost nothing while they are known from the requests that this
caller sent and saw end. Every caller, which is every gateway, has a router of its own; Serve sends
it this module by value.
"""

import random

from ray.serve.request_router import (
    FIFOMixin,
    LocalityMixin,
    PendingRequest,
    RequestRouter,
    RunningReplica,
)

CHOICES = 8
"""Replicas that are compared. What a caller does not know, it asks all of them for at once."""


class ShortestOfSeveral(LocalityMixin, FIFOMixin, RequestRouter):
    """Draws `CHOICES` replicas; `RequestRouter` takes the one with the fewest ongoing requests."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """In random order, for the first of those with equally few is taken."""
        nearby = self.apply_locality_routing(pending_request)
        drawn = random.sample(tuple(nearby), min(CHOICES, len(nearby)))
        return [[self.curr_replicas[replica] for replica in drawn]]
