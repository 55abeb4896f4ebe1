"""What becomes of Ray's errors at the handle, on a handle that answers as told."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serve_app.engine.encoding import Encoding, PartialImage
from serve_app.engine.params import FRESH, GenerationParams
from serve_app.errors import GenerationFailed, InvalidRequest, Overloaded, Unavailable
from serve_app.gateway import deployment, replicas
from serve_app.gateway.deployment import REPLICA_ATTEMPTS, HandlePainter
from serve_app.gateway.replicas import Replicas
from serve_app.metrics import HELD

pytestmark = pytest.mark.anyio

PARAMS = GenerationParams("x", 1)
DEPLOYMENT = DeploymentID(name="Generator", app_name="diffusion-serve")


class Response:
    """What a handle's ``remote`` returns: may be awaited, or iterated over, and cancelled."""

    def __init__(self, *answers: Any) -> None:
        self._answers = answers
        self.cancelled = False
        self.standing = FRESH
        """Of the request that it answers."""

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
        for _ in range(3):
            await asyncio.sleep(0)  # nobody answers at once
        if isinstance(answer, Exception):
            raise answer
        return answer


async def fleet_of_one() -> Any:
    return SimpleNamespace(replicas=[replica("a")], target_num_replicas=1)


def replica(name: str, state: str = "RUNNING", start_time_s: float = 0.0) -> Any:
    return SimpleNamespace(replica_id=name, state=state, start_time_s=start_time_s)


def painter_of(
    *calls: Any, fleet: Any = fleet_of_one, max_hold_s: float = 60.0
) -> tuple[HandlePainter, list[Response]]:
    """A painter whose handle answers so, one or several answers a call; ``None`` never comes."""
    responses = [Response(*(call if isinstance(call, list) else [call])) for call in calls]
    pending = iter(responses)

    def answer(*args: Any) -> Response:
        response = next(pending)
        if args:
            response.standing = args[-1]
        return response

    method = SimpleNamespace(remote=answer)
    handle: Any = SimpleNamespace(generate=method, describe=method, options=lambda stream: handle)
    return HandlePainter(handle, max_hold_s, Replicas(fleet)), responses


def raised_by_replica(error: Exception) -> Exception:
    """As Ray hands it to the caller."""
    wrapped: Exception = RayTaskError("generate", "traceback", error).as_instanceof_cause()
    return wrapped


async def events_of(painter: HandlePainter, params: GenerationParams = PARAMS) -> list[Any]:
    return [event async for event in painter.paint(params, Encoding())]


async def paint(painter: HandlePainter, params: GenerationParams = PARAMS) -> Any:
    return (await events_of(painter, params))[-1]


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


class Growing:
    """A deployment whose second replica starts to run when told."""

    def __init__(self, target: int = 2, start_time_s: float = 0.0) -> None:
        self.target = target
        self.start_time_s = start_time_s
        self.grown = False
        self.asked = 0

    async def __call__(self) -> Any:
        self.asked += 1
        replicas = [replica("a")]
        if self.target > 1:
            state = "RUNNING" if self.grown else "STARTING"
            replicas.append(replica("b", state, self.start_time_s))
        return SimpleNamespace(replicas=replicas, target_num_replicas=self.target)


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> Growing:
    monkeypatch.setattr(deployment, "LOOK_EVERY_S", 0.001)
    monkeypatch.setattr(replicas, "LOOK_EVERY_S", 0.0)
    return Growing()


OVERLOADED = raised_by_replica(Overloaded("full.", None, 40.0, 8.0))


async def test_a_refused_request_waits_for_the_replica_that_is_starting(growing: Growing) -> None:
    painter, responses = painter_of(OVERLOADED, "picture", fleet=growing)
    task = asyncio.ensure_future(paint(painter))
    while growing.asked < 5:
        await asyncio.sleep(0)
    assert not task.done()
    assert HELD._value.get() == 1
    growing.grown = True
    assert await task == "picture"
    assert HELD._value.get() == 0
    assert [response.standing.returning for response in responses] == [False, True]


async def test_or_for_room_in_the_one_that_refused_it(growing: Growing) -> None:
    full = raised_by_replica(Overloaded("full.", None, 0.02, 8.0))
    painter, responses = painter_of(full, full, "picture", fleet=growing)
    assert await paint(painter) == "picture"
    assert [one.standing.returning for one in responses] == [False, True, True]


async def test_it_waits_no_longer_than_it_may(growing: Growing) -> None:
    painter, _ = painter_of(OVERLOADED, fleet=growing, max_hold_s=0.05)
    with pytest.raises(Overloaded, match="full"):
        await paint(painter)
    painter, _ = painter_of(OVERLOADED, fleet=growing)
    with pytest.raises(Overloaded, match="full"):
        await paint(painter, replace(PARAMS, deadline_s=0.05))
    assert HELD._value.get() == 0


async def test_it_does_not_wait_when_nothing_is_starting(growing: Growing) -> None:
    growing.target = 1
    painter, _ = painter_of(OVERLOADED, fleet=growing)
    with pytest.raises(Overloaded) as caught:
        await paint(painter)
    assert (caught.value.retry_after_s, caught.value.work_s) == (40.0, 8.0)
    assert growing.asked == 1


async def test_it_comes_again_when_the_replica_that_is_starting_is_there(
    growing: Growing,
) -> None:
    """Where it may not wait for it; and two replicas do the work in half the time."""
    fleet = Replicas(growing)
    growing.start_time_s = time.time() - 9.0
    await fleet.look()
    growing.grown = True
    grown = await fleet.look()
    assert (grown.running, grown.coming, grown.ready_in_s, grown.target) == (2, 0, None, 2)
    assert grown.states["running"] == 2
    assert grown.states["stopping"] == 0

    async def three() -> Any:
        started = replica("c", "STARTING", time.time() - 1.0)
        both = [replica("a"), replica("b"), started]
        return SimpleNamespace(replicas=both, target_num_replicas=4)

    fleet._ask = three
    seen = await fleet.look()
    assert (seen.running, seen.coming) == (2, 2)
    assert seen.ready_in_s == pytest.approx(8.0, abs=0.5)
    painter, _ = painter_of(OVERLOADED, max_hold_s=5.0)
    painter._replicas = fleet
    with pytest.raises(Overloaded) as caught:
        await paint(painter)
    assert caught.value.retry_after_s == pytest.approx(8.0, abs=0.5)
    assert caught.value.work_s == 4.0


async def test_a_controller_that_does_not_answer_holds_nobody(
    growing: Growing, caplog: pytest.LogCaptureFixture
) -> None:
    async def lost() -> Any:
        raise ActorDiedError

    painter, _ = painter_of(OVERLOADED, fleet=lost)
    with pytest.raises(Overloaded):
        await paint(painter)
    assert "does not say what is starting" in caplog.text


async def test_a_deadline_that_is_too_short_is_for_the_engine_to_judge() -> None:
    """The description promises no 5xx for a deadline of next to nothing."""
    painter, _ = painter_of(InvalidRequest("deadline_s is too short.", "deadline_s"))
    with pytest.raises(InvalidRequest, match="too short"):
        await paint(painter, replace(PARAMS, deadline_s=5e-324))


async def test_the_first_replica_is_waited_for_and_no_longer(growing: Growing) -> None:
    painter, [response] = painter_of(None, fleet=growing, max_hold_s=0.02)
    with pytest.raises(Unavailable, match=r"no replica was ready within 0\.02 s"):
        await paint(painter)
    assert response.cancelled
    painter, [response] = painter_of(None, max_hold_s=0.02)
    with pytest.raises(Unavailable, match="no replica is ready"):
        await painter.describe()
    assert response.cancelled
