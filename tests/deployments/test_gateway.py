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

from serve_app.deployments import gateway as deployment
from serve_app.deployments import ray_compat, replicas
from serve_app.deployments.gateway import REPLICA_ATTEMPTS, ServeBackend
from serve_app.deployments.replicas import Replicas
from serve_app.errors import (
    DeadlineExceeded,
    GenerationFailed,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from serve_app.metrics.gateway import WAITING_FOR_REPLICA
from serve_app.protocol.images import Encoding, PartialImage
from serve_app.protocol.params import INITIAL, GenerationParams

pytestmark = pytest.mark.anyio

PARAMS = GenerationParams("x", 1)
DEPLOYMENT = DeploymentID(name="Generator", app_name="diffusion-serve")


class Response:
    """What a handle's ``remote`` returns: may be awaited, or iterated over, and cancelled."""

    def __init__(self, *answers: Any) -> None:
        self._answers = answers
        self.cancelled = False
        self.context = INITIAL
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
        if isinstance(answer, float):
            await asyncio.sleep(answer)
        return answer


async def status_of_one() -> Any:
    return SimpleNamespace(replicas=[replica("a")], target_num_replicas=1)


def replica(name: str, state: str = "RUNNING", start_time_s: float = 0.0) -> Any:
    return SimpleNamespace(replica_id=name, state=state, start_time_s=start_time_s)


async def no_replicas() -> Any:
    return SimpleNamespace(replicas=[], target_num_replicas=1)


def backend_of(
    *calls: Any,
    status: Any = status_of_one,
    max_hold_s: float = 120.0,
    max_deadline_s: float = 60.0,
) -> tuple[ServeBackend, list[Response]]:
    """A backend whose handle answers so, one or several answers a call; ``None`` never comes, and
    a number takes so many seconds."""
    responses = [Response(*(call if isinstance(call, list) else [call])) for call in calls]
    pending = iter(responses)

    def answer(*args: Any) -> Response:
        response = next(pending)
        if args:
            response.context = args[-1]
        return response

    method = SimpleNamespace(remote=answer)
    handle: Any = SimpleNamespace(generate=method, describe=method, options=lambda stream: handle)
    return ServeBackend(handle, max_hold_s, max_deadline_s, Replicas(status)), responses


def raised_by_replica(error: Exception) -> Exception:
    """As Ray hands it to the caller."""
    wrapped: Exception = RayTaskError("generate", "traceback", error).as_instanceof_cause()
    return wrapped


async def events_of(backend: ServeBackend, params: GenerationParams = PARAMS) -> list[Any]:
    return [event async for event in backend.generate(params, Encoding())]


async def generate(backend: ServeBackend, params: GenerationParams = PARAMS) -> Any:
    return (await events_of(backend, params))[-1]


async def test_a_request_outlives_the_replicas_that_it_loses() -> None:
    backend, _ = backend_of(ActorDiedError(), ObjectLostError("id", None, "stack"), "image")
    assert await generate(backend) == "image"
    closing = raised_by_replica(Unavailable("closing"))
    backend, _ = backend_of(closing, "image")
    assert await generate(backend) == "image"


async def test_a_stream_goes_on_after_its_replica_is_lost() -> None:
    """And no preview comes twice."""
    previews = [PartialImage(index, b"") for index in range(3)]
    backend, _ = backend_of(
        ["queued", previews[0], previews[1], ActorDiedError()],
        ["queued again", *previews, "image"],
    )
    assert await events_of(backend) == [
        "queued",
        previews[0],
        previews[1],
        "queued again",
        previews[2],
        "image",
    ]


async def test_who_stops_listening_cancels_the_work() -> None:
    backend, [response] = backend_of(["queued", None])
    events = backend.generate(PARAMS, Encoding())
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
    backend, _ = backend_of(*[answer] * REPLICA_ATTEMPTS)
    with pytest.raises(Unavailable, match=message):
        await generate(backend)


@pytest.mark.parametrize("work", [generate, ServeBackend.describe])
async def test_a_full_queue_is_told_at_once(
    work: Callable[[ServeBackend], Awaitable[Any]],
) -> None:
    """And to come when the first replica should be there, where there is none."""
    backend, _ = backend_of(BackPressureError(1, 1), "not asked for")
    with pytest.raises(Overloaded, match="too many requests") as caught:
        await work(backend)
    assert caught.value.retry_after_s is None
    backend, _ = backend_of(BackPressureError(1, 1), "not asked for", status=no_replicas)
    backend._replicas._cold_start_s = 85.0
    with pytest.raises(Overloaded, match="too many requests") as caught:
        await work(backend)
    assert caught.value.retry_after_s == 85.0


@pytest.mark.parametrize("error", [InvalidRequest("no", "size"), GenerationFailed("no")])
async def test_what_the_replica_raised_is_raised_as_it_was_and_once(error: Exception) -> None:
    backend, _ = backend_of(raised_by_replica(error), "not asked for")
    with pytest.raises(type(error)) as caught:
        await generate(backend)
    assert type(caught.value) is type(error)


@pytest.mark.parametrize("work", [generate, ServeBackend.describe, ServeBackend.check_ready])
async def test_cancelling_cancels_the_work_behind_it(
    work: Callable[[ServeBackend], Awaitable[Any]],
) -> None:
    backend, [response] = backend_of(None)
    task = asyncio.ensure_future(work(backend))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert response.cancelled


async def test_a_replica_that_does_not_answer_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "HEALTH_TIMEOUT_S", 0.01)
    backend, [response] = backend_of(None)
    with pytest.raises(Unavailable, match="no replica was ready"):
        await backend.check_ready()
    assert response.cancelled


async def test_the_model_is_asked_for_once_and_readiness_each_time() -> None:
    backend, _ = backend_of("model", ActorDiedError(), raised_by_replica(Unavailable("stopped")))
    assert await backend.describe() == "model"
    with pytest.raises(Unavailable, match="was lost"):
        await backend.check_ready()
    with pytest.raises(Unavailable, match="stopped"):
        await backend.check_ready()
    assert await backend.describe() == "model"


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
    monkeypatch.setattr(ray_compat, "_get_global_client", lambda: client)
    assert ray_compat.address_beyond_loopback() == open_to


class Growing:
    """A deployment whose second replica starts to run when told."""

    def __init__(self) -> None:
        self.target = 2
        self.start_time_s = time.time()
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
    monkeypatch.setattr(deployment, "REFRESH_EVERY_S", 0.001)
    monkeypatch.setattr(replicas, "REFRESH_EVERY_S", 0.0)
    return Growing()


OVERLOADED = raised_by_replica(Overloaded("full.", None, 40.0, 8.0))


async def test_a_refused_request_waits_for_the_replica_that_is_starting(growing: Growing) -> None:
    backend, responses = backend_of(OVERLOADED, "image", status=growing)
    task = asyncio.ensure_future(generate(backend))
    while growing.asked < 5:
        await asyncio.sleep(0)
    assert not task.done()
    assert WAITING_FOR_REPLICA._value.get() == 1
    growing.grown = True
    assert await task == "image"
    assert WAITING_FOR_REPLICA._value.get() == 0
    assert [response.context.is_retry for response in responses] == [False, True]


async def test_or_for_room_in_the_one_that_refused_it(growing: Growing) -> None:
    full = raised_by_replica(Overloaded("full.", None, 0.02, 8.0))
    backend, responses = backend_of(full, full, "image", status=growing)
    assert await generate(backend) == "image"
    assert [one.context.is_retry for one in responses] == [False, True, True]


async def test_it_waits_no_longer_than_it_may(growing: Growing) -> None:
    """And is then told what is true then: of the replica, and of the one that refused it."""
    for room_in_s in (40.0, 0.4):
        full = raised_by_replica(Overloaded("full.", None, room_in_s, 8.0))
        for max_hold_s, deadline_s in ((0.2, None), (60.0, 0.2)):
            growing.asked = 0
            growing.start_time_s = time.time()
            backend, _ = backend_of(full, status=growing, max_hold_s=max_hold_s)
            backend._replicas._cold_start_s = 0.1
            with pytest.raises(Overloaded, match="full") as caught:
                await generate(backend, replace(PARAMS, deadline_s=deadline_s))
            assert growing.asked > 2
            assert caught.value.retry_after_s is not None
            # The start is overdue by then, by as long as it should have taken.
            assert caught.value.retry_after_s == pytest.approx(min(0.12, room_in_s - 0.2), abs=0.06)
    assert WAITING_FOR_REPLICA._value.get() == 0


async def test_it_does_not_wait_when_nothing_is_starting(growing: Growing) -> None:
    growing.target = 1
    backend, _ = backend_of(OVERLOADED, status=growing)
    with pytest.raises(Overloaded) as caught:
        await generate(backend)
    assert (caught.value.retry_after_s, caught.value.work_s) == (pytest.approx(40.0, abs=0.1), 8.0)
    assert growing.asked < 10  # looks within a second are one


async def test_it_comes_again_when_the_replica_that_is_starting_is_there(
    growing: Growing,
) -> None:
    """Where it may not wait for it; and three replicas do the work in a third of the time."""
    status = Replicas(growing)
    growing.start_time_s = time.time() - 9.0
    await status.refresh()
    growing.grown = True
    grown = await status.refresh()
    assert (grown.running, grown.coming, grown.ready_s, grown.target) == (2, 0, (), 2)
    assert grown.states["running"] == 2
    assert grown.states["stopping"] == 0

    async def three() -> Any:
        started = replica("c", "STARTING", time.time() - 1.0)
        both = [replica("a"), replica("b"), started]
        return SimpleNamespace(replicas=both, target_num_replicas=4)

    status._fetch = three
    seen = await status.refresh()
    assert (seen.running, seen.coming) == (2, 2)
    assert seen.ready_in_s == pytest.approx(8.0, abs=0.5)
    backend, _ = backend_of(OVERLOADED, max_hold_s=5.0)
    backend._replicas = status
    with pytest.raises(Overloaded) as caught:
        await generate(backend)
    assert caught.value.retry_after_s == pytest.approx(8.0, abs=0.5)
    assert caught.value.work_s == pytest.approx(8.0 / 3)
    # Before the third is there, it does nothing of what is promised.
    soon = raised_by_replica(Overloaded("full.", None, 2.0, 8.0))
    backend, _ = backend_of(soon, max_hold_s=5.0)
    backend._replicas = status
    with pytest.raises(Overloaded) as caught:
        await generate(backend)
    assert (caught.value.retry_after_s, caught.value.work_s) == (pytest.approx(2.0, abs=0.1), 4.0)


async def test_a_controller_that_does_not_answer_holds_nobody(
    growing: Growing, caplog: pytest.LogCaptureFixture
) -> None:
    async def lost() -> Any:
        raise ActorDiedError

    backend, _ = backend_of(OVERLOADED, status=lost)
    with pytest.raises(Overloaded):
        await generate(backend)
    assert "does not report its replicas" in caplog.text


async def test_a_deadline_that_is_too_short_is_for_the_engine_to_judge() -> None:
    """The description promises no 5xx for a deadline of next to nothing."""
    backend, _ = backend_of(InvalidRequest("deadline_s is too short.", "deadline_s"))
    with pytest.raises(InvalidRequest, match="too short"):
        await generate(backend, replace(PARAMS, deadline_s=5e-324))


async def test_the_first_replica_is_waited_for_and_no_longer() -> None:
    """For as long as the request may take, on a gateway that has just started too; and then it is
    told when that replica should be there."""
    works: list[Callable[[ServeBackend], Awaitable[Any]]] = [
        generate,
        ServeBackend.describe,
        lambda backend: generate(backend, replace(PARAMS, deadline_s=0.02)),
        lambda backend: backend.describe(0.02),
    ]
    for work, max_hold_s in zip(works, (0.02, 0.02, 60.0, 60.0), strict=True):
        backend, [response] = backend_of(None, status=no_replicas, max_hold_s=max_hold_s)
        backend._replicas._cold_start_s = 85.0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deployment, "FIRST_ANSWER_WITHIN_S", 0.02)
            with pytest.raises(Unavailable, match=r"no replica was ready within 0\.02 s") as caught:
                await asyncio.wait_for(work(backend), 5)
        assert caught.value.retry_after_s == 85.0
        assert response.cancelled


async def test_waiting_for_a_replica_is_no_part_of_generation() -> None:
    """So a start may take longer than a image may, and so may the next one, if that is lost."""
    answers = [0.2, "queued"]
    backend, _ = backend_of([*answers, "image"], max_deadline_s=0.1)
    assert await generate(backend) == "image"
    backend, _ = backend_of([*answers, ActorDiedError()], [*answers, "image"], max_deadline_s=0.1)
    assert await generate(backend) == "image"


async def test_who_takes_too_long_to_be_generated_is_given_up() -> None:
    """On several replicas together as on one."""
    backend, [response] = backend_of(["queued", None], max_deadline_s=0.05)
    with pytest.raises(DeadlineExceeded, match=r"within 0\.05 s"):
        await generate(backend)
    assert response.cancelled
    lost = ["queued", 0.15, ActorDiedError()]
    backend, _ = backend_of(lost, [*lost[:2], "image"], max_deadline_s=0.2)
    with pytest.raises(DeadlineExceeded, match=r"within 0\.2 s"):
        await generate(backend)


async def test_a_start_is_learnt_from_who_looks_while_it_ends(growing: Growing) -> None:
    """Not from who looks an hour later, for it may have ended any time before."""
    now = 1e9
    status = Replicas(growing)
    growing.start_time_s = now - 9.0
    status._updated(await growing(), now)
    growing.grown = True
    status._updated(await growing(), now + 3_600)
    assert status._cold_start_s is None
    growing.grown = False
    status._updated(await growing(), now + 79.0)
    growing.grown = True
    status._updated(await growing(), now + 81.0)
    assert status._cold_start_s == 90.0


async def test_the_longer_a_start_is_overdue_the_longer_it_is_said_to_take(
    growing: Growing,
) -> None:
    now = growing.start_time_s
    status = Replicas(growing)
    assert status._updated(await growing(), now + 20.0).ready_in_s == 40.0  # none was seen yet
    status._cold_start_s = 90.0
    said_s = [
        status._updated(await growing(), now + age_s).ready_in_s for age_s in (30, 81, 90, 120, 300)
    ]
    assert said_s == [60.0, 9.0, 18.0, 48.0, 228.0]


async def test_who_waits_for_the_first_replica_sees_it_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that the gateway knows the next time how long that takes."""
    monkeypatch.setattr(replicas, "REFRESH_EVERY_S", 0.01)
    started_at, running = time.time(), False

    async def first() -> Any:
        state = "RUNNING" if running else "STARTING"
        return SimpleNamespace(replicas=[replica("a", state, started_at)], target_num_replicas=1)

    for work in (generate, ServeBackend.describe):
        running = False
        backend, _ = backend_of([0.2, "image"] if work is generate else [0.2], status=first)
        task = asyncio.ensure_future(work(backend))
        await asyncio.sleep(0.1)
        running = True
        await task
        watch = backend._replicas._watch
        assert watch is not None
        await asyncio.wait_for(watch, 5)  # it stops by itself
        assert backend._replicas._cold_start_s is not None
