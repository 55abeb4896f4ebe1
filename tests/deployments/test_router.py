"""Which replica the router takes, on Serve's own machinery with replicas that only count."""

import asyncio
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
from serve_app.deployments.router import CHOICES, AdapterRouter, ShortestOfSeveral
from serve_app.planner.cluster import ClusterParams
from serve_app.protocol.params import GenerationParams

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


def adapter_router(*replicas: Replica) -> AdapterRouter:
    chooser = AdapterRouter(
        deployment_id=DEPLOYMENT,
        handle_source=DeploymentHandleSource.REPLICA,
        use_replica_queue_len_cache=True,
    )
    chooser.update_replicas(list(replicas))  # type: ignore[arg-type]
    return chooser


async def send(chooser: AdapterRouter, *adapters: str, number: int = 1) -> str:
    """Send a request with these adapters, and return the name of its replica."""
    params = GenerationParams("a star", 1, lora=tuple((name, 1.0) for name in adapters))
    metadata = RequestMetadata(str(number), str(number))
    pending = PendingRequest(args=[params], kwargs={}, metadata=metadata)
    chosen: Any = await chooser._choose_replica_for_request(pending)
    chooser.on_send_request(chosen.replica_id)
    return str(chosen.name)


@pytest.mark.anyio
async def test_all_gateways_send_an_adapter_to_the_same_replica() -> None:
    names = [f"style-{number}" for number in range(40)]
    chosen = []
    for _ in range(3):
        one = adapter_router(*(Replica(str(number), 0) for number in range(4)))
        chosen.append([await send(one, name) for name in names])
        for replica_id in one.curr_replicas:
            one.replica_queue_len_cache.invalidate_key(replica_id)
    assert chosen[0] == chosen[1] == chosen[2]
    # No replica has more than half of the adapters, or none.
    assert max(Counter(chosen[0]).values()) <= 20
    assert len(set(chosen[0])) == 4


@pytest.mark.anyio
async def test_a_replica_that_goes_takes_only_its_own_adapters_along() -> None:
    names = [f"style-{number}" for number in range(40)]
    replicas = [Replica(str(number), 0) for number in range(4)]

    async def places(*there: Replica) -> dict[str, str]:
        found = {}
        for name in names:
            found[name] = await send(adapter_router(*there), name)
        return found

    before, after = await places(*replicas), await places(*replicas[:3])
    moved = {name for name in names if before[name] != after[name]}
    assert moved == {name for name in names if before[name] == "3"}


@pytest.mark.anyio
async def test_a_replica_that_is_much_busier_is_passed_over() -> None:
    chooser = adapter_router(Replica("a", 0), Replica("b", 0))
    sent = Counter([await send(chooser, "ink") for _ in range(16)])
    assert set(sent) == {"a", "b"}
    # 1.25 times the mean: the replica of the adapter has the larger part.
    assert max(sent.values()) in (9, 10, 11)


@pytest.mark.anyio
async def test_requests_without_adapters_go_to_the_least_busy_replica() -> None:
    chooser = adapter_router(*(Replica(str(number), 0) for number in range(4)))
    sent = Counter([await send(chooser) for _ in range(16)])
    assert sorted(sent.values()) == [4] * 4


@pytest.mark.anyio
async def test_a_full_replica_gets_no_request_with_an_adapter() -> None:
    chooser = adapter_router(Replica("a", 2, 2), Replica("b", 2, 2), Replica("free", 2, 9))
    assert {await send(chooser, f"style-{number}") for number in range(4)} == {"free"}


@pytest.mark.anyio
async def test_simultaneous_requests_get_the_replicas_of_their_own_adapters() -> None:
    names = [f"style-{number}" for number in range(8)]
    alone = {}
    for name in names:
        alone[name] = await send(adapter_router(*(Replica(str(n), 0) for n in range(4))), name)
    chooser = adapter_router(*(Replica(str(number), 0) for number in range(4)))
    together = await asyncio.gather(
        *(send(chooser, name, number=number) for number, name in enumerate(names))
    )
    same = sum(alone[name] == one for name, one in zip(names, together, strict=True))
    assert same >= len(names) // 2  # the others were passed over


def test_the_simulator_draws_as_many_replicas() -> None:
    assert (ClusterParams().routing, ClusterParams().choices) == ("count", CHOICES)
    options = signature(plan).parameters
    assert [options[name].default for name in ("routing", "choices")] == ["count", CHOICES]


def test_serve_accepts_the_router_in_a_config() -> None:
    config = RequestRouterConfig(request_router_class=AdapterRouter)  # type: ignore[arg-type]
    assert config.request_router_class == "serve_app.deployments.router.AdapterRouter"
    assert config.get_request_router_class().__name__ == "AdapterRouter"


def test_the_generator_uses_the_router() -> None:
    config = Generator._deployment_config.request_router_config  # type: ignore[attr-defined]
    assert config.get_request_router_class().__name__ == "AdapterRouter"
