"""What becomes of Ray's errors at the handle, on a handle that answers as told."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serve_app.engine.params import GenerationParams
from serve_app.errors import GenerationFailed, InvalidRequest, Unavailable
from serve_app.gateway import deployment
from serve_app.gateway.deployment import REPLICA_ATTEMPTS, HandlePainter

pytestmark = pytest.mark.anyio

PARAMS = GenerationParams("x", 1)
DEPLOYMENT = DeploymentID(name="Generator", app_name="diffusion-serve")


class Response:
    """What a handle's ``remote`` returns: may be awaited and cancelled."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def __await__(self) -> Iterator[Any]:
        return self._wait().__await__()

    async def _wait(self) -> Any:
        if self._answer is None:
            await asyncio.Event().wait()
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def painter_of(*answers: Any) -> tuple[HandlePainter, list[Response]]:
    """A painter whose handle gives these answers, one a call; ``None`` never comes."""
    responses = [Response(answer) for answer in answers]
    calls = iter(responses)
    method = SimpleNamespace(remote=lambda *args: next(calls))
    handle: Any = SimpleNamespace(generate=method, describe=method)
    return HandlePainter(handle), responses


def raised_by_replica(error: Exception) -> Exception:
    """As Ray hands it to the caller."""
    wrapped: Exception = RayTaskError("generate", "traceback", error).as_instanceof_cause()
    return wrapped


async def paint(painter: HandlePainter) -> Any:
    return await painter.paint(PARAMS, "png")


async def test_a_request_outlives_the_replicas_that_it_loses() -> None:
    painter, _ = painter_of(ActorDiedError(), ObjectLostError("id", None, "stack"), "picture")
    assert await paint(painter) == "picture"
    closing = raised_by_replica(Unavailable("closing"))
    painter, _ = painter_of(closing, "picture")
    assert await paint(painter) == "picture"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (ActorDiedError(), "were lost"),
        (raised_by_replica(Unavailable("closing")), "closing"),
        (BackPressureError(1, 1), "too many requests"),
        (DeploymentUnavailableError(DEPLOYMENT), "could not be started"),
    ],
)
async def test_what_stays_unavailable_says_so(answer: Exception, message: str) -> None:
    painter, _ = painter_of(*[answer] * REPLICA_ATTEMPTS)
    with pytest.raises(Unavailable, match=message):
        await paint(painter)


@pytest.mark.parametrize("error", [InvalidRequest("no", "size"), GenerationFailed("no")])
async def test_what_the_replica_raised_is_raised_as_it_was_and_once(error: Exception) -> None:
    painter, _ = painter_of(raised_by_replica(error), "not asked for")
    with pytest.raises(type(error)) as caught:
        await paint(painter)
    assert type(caught.value) is type(error)


@pytest.mark.parametrize("work", [paint, HandlePainter.describe, HandlePainter.check_ready])
async def test_cancelling_cancels_the_work_behind_it(
    work: Callable[[HandlePainter], Awaitable[Any]],
) -> None:
    painter, [response] = painter_of(None)
    task = asyncio.ensure_future(work(painter))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert response.cancelled


async def test_a_replica_that_does_not_answer_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "HEALTH_TIMEOUT_S", 0.01)
    painter, [response] = painter_of(None)
    with pytest.raises(Unavailable, match="no replica is ready"):
        await painter.check_ready()
    assert response.cancelled


async def test_the_model_is_asked_for_once_and_readiness_each_time() -> None:
    painter, _ = painter_of("model", ActorDiedError(), raised_by_replica(Unavailable("stopped")))
    assert await painter.describe() == "model"
    with pytest.raises(Unavailable, match="no replica is ready"):
        await painter.check_ready()
    with pytest.raises(Unavailable, match="stopped"):
        await painter.check_ready()
    assert await painter.describe() == "model"
