"""How long a request waits for a gateway, on Serve's machinery with replicas that only count."""

import asyncio
import time
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, RequestMetadata
from ray.serve._private.http_util import get_http_response_status
from ray.serve.request_router import PendingRequest

from serve_app.app import build
from serve_app.deployments.router import GATEWAY_WITHIN_S, GatewayRouter, NoGateway
from tests.deployments.test_router import DEPLOYMENT, Replica

pytestmark = pytest.mark.anyio


def router(hold_s: float, *replicas: Any) -> GatewayRouter:
    chooser = GatewayRouter(
        deployment_id=DEPLOYMENT,
        handle_source=DeploymentHandleSource.REPLICA,
        use_replica_queue_len_cache=True,
    )
    chooser.initialize_state(hold_s=hold_s)
    chooser.update_replicas(list(replicas))
    return chooser


def request() -> PendingRequest:
    return PendingRequest(args=[], kwargs={}, metadata=RequestMetadata("1", "1"))


@pytest.mark.parametrize("replicas", [[], [Replica("full", 2, max_ongoing_requests=2)]])
async def test_a_request_that_no_gateway_accepts_is_rejected_in_time(replicas: list[Any]) -> None:
    chooser = router(0.3, *replicas)
    began_at = time.monotonic()
    with pytest.raises(NoGateway, match=r"no gateway.*0\.3 s") as caught:
        await chooser._choose_replica_for_request(request())
    assert 0.3 <= time.monotonic() - began_at < 10
    assert get_http_response_status(caught.value, None, "1").code == 503
    # It takes no place from requests that come later.
    chooser.update_replicas([Replica("late", 0)])  # type: ignore[list-item]
    later = chooser._choose_replica_for_request(request())
    assert (await asyncio.wait_for(later, 20)).replica_id.unique_id == "late"
    assert chooser.num_pending_requests == 0


async def test_a_gateway_that_starts_in_time_gets_the_request() -> None:
    chooser = router(60.0)
    waiting = asyncio.ensure_future(chooser._choose_replica_for_request(request()))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    chooser.update_replicas([Replica("late", 0)])  # type: ignore[list-item]
    assert (await asyncio.wait_for(waiting, 20)).replica_id.unique_id == "late"


async def test_a_request_that_a_gateway_has_rejected_has_the_rest_of_its_time() -> None:
    chooser = router(60.0)
    pending = request()
    pending.created_at -= 60.0
    with pytest.raises(NoGateway):
        await asyncio.wait_for(chooser._choose_replica_for_request(pending, is_retry=True), 20)


@pytest.mark.parametrize(("max_hold_s", "held_s"), [(300.0, GATEWAY_WITHIN_S), (2.0, 2.0)])
async def test_the_application_sets_the_limit(max_hold_s: float, held_s: float) -> None:
    application = build({"model": {"id": "demo"}, "gateway": {"max_hold_s": max_hold_s}})
    config = application._bound_deployment._deployment_config.request_router_config  # type: ignore[attr-defined]
    assert config.get_request_router_class().__name__ == "GatewayRouter"
    assert config.request_router_kwargs == {"hold_s": held_s}
