"""The router inside Serve, with replicas that never end a request."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray import serve

from serve_app.deployments.router import ShortestOfSeveral
from tests.e2e.conftest import Server
from tests.serve_process import connected
from tests.waiting import wait_until

pytestmark = pytest.mark.serve

REPLICAS = 4
EACH = 4


@pytest.fixture
def driver(server: Server) -> Iterator[None]:
    with connected(server.ray_address):
        yield


@pytest.fixture
def holder(driver: None) -> Iterator[tuple[Any, Any]]:
    """A deployment whose requests never end, and an actor that counts them by replica."""

    @ray.remote(num_cpus=0)
    class Watcher:
        def __init__(self) -> None:
            self.seen: list[str] = []

        def arrived(self, replica: str) -> None:
            self.seen.append(replica)

        def all(self) -> list[str]:
            return self.seen

    watcher = Watcher.remote()

    @serve.deployment(
        num_replicas=REPLICAS,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=100,
        request_router_config={"request_router_class": ShortestOfSeveral},
    )
    class Holder:
        async def __call__(self) -> None:
            me = serve.get_replica_context().replica_id.unique_id
            await watcher.arrived.remote(me)
            await asyncio.Event().wait()

    try:
        yield serve.run(Holder.bind(), name="holder", route_prefix=None), watcher
    finally:
        serve.delete("holder")


def test_requests_are_spread_evenly(holder: tuple[Any, Any]) -> None:
    handle, watcher = holder
    answers = []
    for number in range(1, REPLICAS * EACH + 1):
        answers.append(handle.remote())
        wait_until(lambda sent=number: len(ray.get(watcher.all.remote())) == sent, 20)
    # The better of two random replicas would spread them evenly once in thirty runs.
    assert list(Counter(ray.get(watcher.all.remote())).values()) == [EACH] * REPLICAS
    for answer in answers:
        answer.cancel()
