"""What becomes of Ray's errors at the handle, on a handle that answers as told."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serve_app.engine.encoding import Encoding, PartialImage
from serve_app.engine.params import GenerationParams
from serve_app.errors import GenerationFailed, InvalidRequest, Overloaded, Unavailable
from serve_app.gateway import deployment
from serve_app.gateway.deployment import REPLICA_ATTEMPTS, HandlePainter

pytestmark = pytest.mark.anyio

PARAMS = GenerationParams("x", 1)
DEPLOYMENT = DeploymentID(name="Generator", app_name="diffusion-serve")


class Response:
    """What a handle's ``remote`` returns: may be awaited, or iterated over, and cancelled."""

    def __init__(self, *answers: Any) -> None:
        self._answers = answers
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def __await__(self) -> Iterator[Any]:
        return self._wait(self._answers[0]).__await__()

    async def __aiter__(self) -> AsyncIterator[Any]:
        for answer in self._answers:
            yield await self._wait(answer)

    async def _wait(self, answer: Any) -> Any:
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        return answer


def painter_of(*calls: Any) -> tuple[HandlePainter, list[Response]]:
    """A painter whose handle answers so, one or several answers a call; ``None`` never comes."""
    responses = [Response(*(call if isinstance(call, list) else [call])) for call in calls]
    pending = iter(responses)
    method = SimpleNamespace(remote=lambda *args: next(pending))
    handle: Any = SimpleNamespace(generate=method, describe=method, options=lambda stream: handle)
    return HandlePainter(handle), responses


def raised_by_replica(error: Exception) -> Exception:
    """As Ray hands it to the caller."""
    wrapped: Exception = RayTaskError("generate", "traceback", error).as_instanceof_cause()
    return wrapped


async def events_of(painter: HandlePainter) -> list[Any]:
    return [event async for event in painter.paint(PARAMS, Encoding())]


async def paint(painter: HandlePainter) -> Any:
    return (await events_of(painter))[-1]


async def test_a_request_outlives_the_replicas_that_it_loses() -> None:
    painter, _ = painter_of(ActorDiedError(), ObjectLostError("id", None, "stack"), "picture")
    assert await paint(painter) == "picture"
    closing = raised_by_replica(Unavailable("closing"))
    painter, _ = painter_of(closing, "picture")
    assert await paint(painter) == "picture"


async def test_a_stream_goes_on_after_its_replica_is_lost() -> None:
    """And no preview comes twice."""
    previews = [PartialImage(index, b"") for index in range(3)]
    painter, _ = painter_of(
        ["queued", previews[0], previews[1], ActorDiedError()],
        ["queued again", *previews, "picture"],
    )
    assert await events_of(painter) == [
        "queued",
        previews[0],
        previews[1],
        "queued again",
        previews[2],
        "picture",
    ]


async def test_who_stops_listening_cancels_the_work() -> None:
    painter, [response] = painter_of(["queued", None])
    events = painter.paint(PARAMS, Encoding())
    assert await anext(events) == "queued"
    assert not response.cancelled
    await events.aclose()
    assert response.cancelled


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (ActorDiedError(), "were lost"),
        (raised_by_replica(Unavailable("closing")), "closing"),
        (DeploymentUnavailableError(DEPLOYMENT), "could not be started"),
    ],
)
async def test_what_stays_unavailable_says_so(answer: Exception, message: str) -> None:
    painter, _ = painter_of(*[answer] * REPLICA_ATTEMPTS)
    with pytest.raises(Unavailable, match=message):
        await paint(painter)


async def test_a_full_queue_is_told_at_once() -> None:
    painter, _ = painter_of(BackPressureError(1, 1), "not asked for")
    with pytest.raises(Overloaded, match="too many requests"):
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


@pytest.mark.parametrize(
    ("host", "open_to"),
    [
        ("127.0.0.1", None),
        ("127.0.0.2", None),
        ("::1", None),
        ("localhost", None),
        ("0.0.0.0", "0.0.0.0"),
        ("::", "::"),
        ("10.1.2.3", "10.1.2.3"),
        ("gpu-box.example", "gpu-box.example"),
        (None, "every address"),
    ],
)
def test_addresses_beyond_this_machine_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, host: str | None, open_to: str | None
) -> None:
    client = SimpleNamespace(http_config=SimpleNamespace(host=host))
    monkeypatch.setattr(deployment, "_get_global_client", lambda: client)
    assert deployment._listens_beyond_loopback() == open_to
