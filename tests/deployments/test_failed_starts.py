"""Requests for a model whose replicas cannot start."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from serve_app.deployments import replicas
from serve_app.deployments.replicas import Replicas
from serve_app.errors import Unavailable
from serve_app.protocol.images import Encoding
from serve_app.protocol.params import GenerationParams
from tests.fakes.serve_handle import backend_of, no_replicas
from tests.fakes.serve_status import always, deployment_status, replica

pytestmark = pytest.mark.anyio

FAILED = "REPLICA_STARTUP_FAILED"
PARAMS = GenerationParams("x", 1)


@pytest.fixture(autouse=True)
def _refreshed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "REFRESH_EVERY_S", 0.01)


async def test_a_wait_ends_when_no_replica_will_start() -> None:
    """Serve's handle would keep the request until its time is over."""
    status = always(deployment_status(target=1, trigger=FAILED))
    started_at = time.monotonic()
    backend, [response] = backend_of(None, status=status)
    with pytest.raises(Unavailable, match="could not be started"):
        await backend.describe()
    assert response.cancelled
    backend, [response] = backend_of(None, status=status)
    with pytest.raises(Unavailable, match="could not be started"):
        await anext(backend.generate(PARAMS, Encoding()))
    assert response.cancelled
    assert time.monotonic() - started_at < 60
    assert await backend.state() == "failed"


async def test_a_wait_that_ends_by_itself_is_not_ended_again() -> None:
    """The time of an expiring limit cannot be set."""

    class Late(Replicas):
        @contextmanager
        def watched(self, on_given_up: Callable[[], None]) -> Iterator[None]:
            try:
                yield
            finally:
                on_given_up()

    backend, [response] = backend_of(None, max_hold_s=0.01, known=Late(no_replicas))
    with pytest.raises(Unavailable, match="no replica was ready"):
        await backend.describe()
    assert response.cancelled


async def test_a_waiting_request_that_fails_leaves_the_others_waiting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    known = Replicas(always(deployment_status(target=1, trigger=FAILED)))
    ended = asyncio.Event()

    def fail() -> None:
        raise RuntimeError("a mistake")

    with known.watched(fail), known.watched(ended.set):
        await asyncio.wait_for(ended.wait(), 60)
    assert "a mistake" in caplog.text


async def test_a_request_waits_while_serve_tries_again() -> None:
    """Without a target, Serve forgets the failure: the request makes it start a replica."""
    backend, _ = backend_of(0.2, status=always(deployment_status(target=0, trigger=FAILED)))
    assert await backend.describe() == 0.2  # the scripted answer, which came in time
    assert await backend.state() == "failed"


async def test_a_request_waits_for_a_model_that_has_run() -> None:
    """Serve goes on with starts of what has started before."""
    ran = [True]

    async def status() -> object:
        return (
            deployment_status(replica("a")) if ran else deployment_status(target=1, trigger=FAILED)
        )

    backend, _ = backend_of(0.2, status=status)
    assert await backend.state() == "running"
    ran.clear()
    assert await backend.describe() == 0.2
