"""Which replica the router takes, on Serve's own machinery with replicas that only count."""

from collections import Counter
from dataclasses import dataclass
from inspect import signature
from typing import Any

import pytest
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
)
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest

from serve_app.cli.plan import plan
from serve_app.deployments.generator import Generator
from serve_app.deployments.router import CHOICES, ShortestOfSeveral
from serve_app.planner.cluster import ClusterParams

DEPLOYMENT = DeploymentID("Generator", "diffusion-serve")


@dataclass
class Replica:
    """The interface of a running replica that Serve's router uses."""

    name: str
    ongoing: int
    max_ongoing_requests: int = 256
    node_id: str = "node"
    availability_zone: str | None = None
    probes: int = 0

    @property
    def replica_id(self) -> ReplicaID:
        return ReplicaID(self.name, DEPLOYMENT)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        self.probes += 1
        return self.ongoing


def router(**options: Any) -> ShortestOfSeveral:
    return ShortestOfSeveral(
        deployment_id=DEPLOYMENT,
        handle_source=DeploymentHandleSource.REPLICA,
        use_replica_queue_len_cache=True,
        **options,
    )


async def choose(chooser: ShortestOfSeveral) -> Replica:
    pending = PendingRequest(args=[], kwargs={}, metadata=RequestMetadata("1", "1"))
    chosen: Any = await chooser._choose_replica_for_request(pending)
    return chosen


@pytest.mark.anyio
async def test_the_replica_with_the_fewest_requests_is_chosen() -> None:
    replicas: Any = [Replica(str(number), ongoing=5) for number in range(CHOICES - 1)]
    replicas.append(Replica("quiet", ongoing=1))
    chooser = router()
    chooser.update_replicas(replicas)
    # Two that are drawn would miss it three times out of four.
    assert [(await choose(chooser)).name for _ in range(20)] == ["quiet"] * 20


@pytest.mark.anyio
async def test_a_cached_queue_length_is_not_probed() -> None:
    replicas: Any = [Replica(str(number), ongoing=0) for number in range(4)]
    chooser = router()
    chooser.update_replicas(replicas)
    await choose(chooser)
    probes = sum(replica.probes for replica in replicas)
    for _ in range(12):
        chosen = await choose(chooser)
        chooser.on_send_request(chosen.replica_id)
    assert sum(replica.probes for replica in replicas) == probes
    # One by one, each goes to the replica with the fewest: the result is even.
    known = [chooser.replica_queue_len_cache.get(replica.replica_id) for replica in replicas]
    assert known == [3] * 4


@pytest.mark.anyio
async def test_the_number_of_compared_replicas_is_limited() -> None:
    replicas: Any = [Replica(str(number), ongoing=number) for number in range(3 * CHOICES)]
    chooser = router()
    chooser.update_replicas(replicas)
    pending = PendingRequest(args=[], kwargs={}, metadata=RequestMetadata("1", "1"))
    drawn: Counter[str] = Counter()
    for _ in range(200):
        [candidates] = await chooser.choose_replicas(replicas, pending)
        names = [candidate.replica_id.unique_id for candidate in candidates]
        assert len(names) == len(set(names)) == CHOICES
        drawn.update(names)
    assert len(drawn) == 3 * CHOICES
    # Each is drawn a third of the time: 67 of 200, give or take seven standard deviations.
    assert min(drawn.values()) > 20
    assert max(drawn.values()) < 114


@pytest.mark.anyio
async def test_a_full_replica_gets_nothing() -> None:
    full, busy = Replica("full", 2, max_ongoing_requests=2), Replica("busy", 9)
    chooser = router()
    chooser.update_replicas([full, busy])  # type: ignore[list-item]
    assert {(await choose(chooser)).name for _ in range(10)} == {"busy"}


def test_the_simulator_draws_as_many_replicas() -> None:
    assert (ClusterParams().routing, ClusterParams().choices) == ("count", CHOICES)
    options = signature(plan).parameters
    assert [options[name].default for name in ("routing", "choices")] == ["count", CHOICES]


def test_serve_accepts_the_router_in_a_config() -> None:
    config = RequestRouterConfig(request_router_class=ShortestOfSeveral)  # type: ignore[arg-type]
    assert config.request_router_class == "serve_app.deployments.router.ShortestOfSeveral"
    assert config.get_request_router_class().__name__ == "ShortestOfSeveral"


def test_the_generator_uses_the_router() -> None:
    config = Generator._deployment_config.request_router_config  # type: ignore[attr-defined]
    assert config.get_request_router_class().__name__ == "ShortestOfSeveral"
