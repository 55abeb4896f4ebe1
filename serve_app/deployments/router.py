"""The request router: it draws several replicas and takes the one with the fewest requests.

Serve's own router draws two. Requests differ a hundredfold in cost, so two counts tell little. More
counts tell more, and cost nothing while the caller knows them from its own requests. Every gateway
has a router of its own. Serve sends it this module by value.
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
"""Replicas that are compared. Unknown counts are requested from all of them at once."""


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
