"""The backend behind a Serve handle, with scripted answers of the handle."""

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

from serve_app.deployments import backend as deployment
from serve_app.deployments import ray_compat, replicas
from serve_app.deployments.backend import REPLICA_ATTEMPTS, ServeBackend
from serve_app.deployments.replicas import Replicas
from serve_app.errors import (
    DeadlineExceeded,
    GenerationFailed,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from serve_app.metrics.registry import GATEWAY
from serve_app.protocol.images import Encoding, PartialImage
from serve_app.protocol.params import INITIAL, GenerationParams
from tests.fakes.serve_status import always, deployment_status, replica

pytestmark = pytest.mark.anyio

PARAMS = GenerationParams("x", 1)
DEPLOYMENT = DeploymentID(name="Generator", app_name="diffusion-serve")


class Response:
    """The result of a handle's ``remote``: awaitable, iterable and cancellable."""

    def __init__(self, *answers: Any) -> None:
        self._answers = answers
        self.cancelled = False
        self.context = INITIAL
        """Context of the request that it answers."""

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
            await asyncio.sleep(0)  # no answer is immediate
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, float):
            await asyncio.sleep(answer)
        return answer


status_of_one = always(deployment_status(replica("a")))
no_replicas = always(deployment_status(target=1))


def waiting_for_replica() -> float | None:
    return GATEWAY.get_sample_value("diffusion_serve_held_requests")


def backend_of(
    *calls: Any,
    status: Any = status_of_one,
    max_hold_s: float = 120.0,
    max_deadline_s: float = 60.0,
    known: Replicas | None = None,
) -> tuple[ServeBackend, list[Response]]:
    """Make a backend whose handle gives these answers, one or several for each call.

    ``None`` is an answer that never comes, and a number one that takes so many seconds.
    """
    responses = [Response(*(call if isinstance(call, list) else [call])) for call in calls]
    pending = iter(responses)

    def answer(*args: Any) -> Response:
        response = next(pending)
        if args:
            response.context = args[-1]
        return response

    method = SimpleNamespace(remote=answer)
    handle: Any = SimpleNamespace(generate=method, describe=method, options=lambda stream: handle)
    return ServeBackend(handle, max_hold_s, max_deadline_s, known or Replicas(status)), responses


def raised_by_replica(error: Exception) -> Exception:
    """Wrap an error as Ray passes it to the caller."""
    wrapped: Exception = RayTaskError("generate", "traceback", error).as_instanceof_cause()
    return wrapped


async def events_of(backend: ServeBackend, params: GenerationParams = PARAMS) -> list[Any]:
    return [event async for event in backend.generate(params, Encoding())]


async def generate(backend: ServeBackend, params: GenerationParams = PARAMS) -> Any:
    return (await events_of(backend, params))[-1]


async def test_a_request_survives_the_loss_of_replicas() -> None:
    backend, _ = backend_of(ActorDiedError(), ObjectLostError("id", None, "stack"), "image")
    assert await generate(backend) == "image"
    closing = raised_by_replica(Unavailable("closing"))
    backend, _ = backend_of(closing, "image")
    assert await generate(backend) == "image"


async def test_a_stream_continues_after_the_loss_of_its_replica() -> None:
    """No preview is sent twice."""
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


async def test_closing_the_stream_cancels_the_work() -> None:
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
async def test_a_lasting_loss_of_replicas_is_unavailable(answer: Exception, message: str) -> None:
    backend, _ = backend_of(*[answer] * REPLICA_ATTEMPTS)
    with pytest.raises(Unavailable, match=message):
        await generate(backend)


async def test_a_model_that_could_not_be_started_is_not_tried_again() -> None:
    backend, _ = backend_of(DeploymentUnavailableError(DEPLOYMENT))
    with pytest.raises(Unavailable, match="could not be started"):
        await generate(backend)


@pytest.mark.parametrize("work", [generate, ServeBackend.describe])
async def test_a_full_queue_rejects_at_once(
    work: Callable[[ServeBackend], Awaitable[Any]],
) -> None:
    """Without a replica, the retry time is the start of the first one."""
    backend, _ = backend_of(BackPressureError(1, 1), "not called")
    with pytest.raises(Overloaded, match="too many requests") as caught:
        await work(backend)
    assert caught.value.retry_after_s is None
    backend, _ = backend_of(
        BackPressureError(1, 1), "not called", known=Replicas(no_replicas, 85.0)
    )
    with pytest.raises(Overloaded, match="too many requests") as caught:
        await work(backend)
    assert caught.value.retry_after_s == 85.0


@pytest.mark.parametrize("error", [InvalidRequest("no", "size"), GenerationFailed("no")])
async def test_an_error_of_the_replica_is_raised_unchanged_and_once(error: Exception) -> None:
    backend, _ = backend_of(raised_by_replica(error), "not called")
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


async def test_the_model_is_described_once_and_readiness_checked_each_time() -> None:
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
def test_public_addresses_are_recognised(
    monkeypatch: pytest.MonkeyPatch, host: str | None, open_to: str | None
) -> None:
    client = SimpleNamespace(http_config=SimpleNamespace(host=host))
    monkeypatch.setattr(ray_compat, "_get_global_client", lambda: client)
    assert ray_compat.address_beyond_loopback() == open_to


class Growing:
    """A deployment whose second replica runs once ``grown`` is set."""

    def __init__(self) -> None:
        self.target = 2
        self.start_time_s = time.time()
        self.grown = False
        self.calls = 0

    async def __call__(self) -> Any:
        self.calls += 1
        replicas = [replica("a")]
        if self.target > 1:
            state = "RUNNING" if self.grown else "STARTING"
            replicas.append(replica("b", state, self.start_time_s))
        return deployment_status(*replicas, target=self.target)


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> Growing:
    monkeypatch.setattr(deployment, "REFRESH_EVERY_S", 0.001)
    monkeypatch.setattr(replicas, "REFRESH_EVERY_S", 0.0)
    return Growing()


OVERLOADED = raised_by_replica(Overloaded("full.", None, 40.0, 8.0))


async def test_a_rejected_request_waits_for_a_starting_replica(growing: Growing) -> None:
    backend, responses = backend_of(OVERLOADED, "image", status=growing)
    task = asyncio.ensure_future(generate(backend))
    while growing.calls < 5:
        await asyncio.sleep(0)
    assert not task.done()
    assert waiting_for_replica() == 1
    growing.grown = True
    assert await task == "image"
    assert waiting_for_replica() == 0
    assert [response.context.is_retry for response in responses] == [False, True]


async def test_a_rejected_request_waits_for_room_in_the_same_replica(growing: Growing) -> None:
    full = raised_by_replica(Overloaded("full.", None, 0.02, 8.0))
    backend, responses = backend_of(full, full, "image", status=growing)
    assert await generate(backend) == "image"
    assert [one.context.is_retry for one in responses] == [False, True, True]


async def test_the_wait_for_a_replica_is_limited(growing: Growing) -> None:
    """The rejection then has the retry time at that moment."""
    for room_in_s in (40.0, 0.4):
        full = raised_by_replica(Overloaded("full.", None, room_in_s, 8.0))
        for max_hold_s, deadline_s in ((0.2, None), (60.0, 0.2)):
            growing.calls = 0
            growing.start_time_s = time.time()
            backend, _ = backend_of(full, max_hold_s=max_hold_s, known=Replicas(growing, 0.1))
            with pytest.raises(Overloaded, match="full") as caught:
                await generate(backend, replace(PARAMS, deadline_s=deadline_s))
            assert growing.calls > 2
            assert caught.value.retry_after_s is not None
            # The start is overdue by then, by as long as it should have taken.
            assert caught.value.retry_after_s == pytest.approx(min(0.12, room_in_s - 0.2), abs=0.06)
    assert waiting_for_replica() == 0


async def test_without_a_starting_replica_there_is_no_wait(growing: Growing) -> None:
    growing.target = 1
    backend, _ = backend_of(OVERLOADED, status=growing)
    with pytest.raises(Overloaded) as caught:
        await generate(backend)
    assert (caught.value.retry_after_s, caught.value.work_s) == (pytest.approx(40.0, abs=0.1), 8.0)
    assert growing.calls < 10  # calls within a second are merged


async def test_the_retry_time_is_the_start_of_the_next_replica(
    growing: Growing,
) -> None:
    """Three replicas then do the work in a third of the time."""
    fetch: Callable[[], Awaitable[Any]] = growing
    status = Replicas(lambda: fetch())
    growing.start_time_s = time.time() - 9.0
    await status.refresh()
    growing.grown = True
    grown = await status.refresh()
    assert (grown.running, grown.coming, grown.ready_s, grown.target) == (2, 0, (), 2)
    assert grown.states["running"] == 2
    assert grown.states["stopping"] == 0

    async def three() -> Any:
        started = replica("c", "STARTING", time.time() - 1.0)
        return deployment_status(replica("a"), replica("b"), started, target=4)

    fetch = three
    seen = await status.refresh()
    assert (seen.running, seen.coming) == (2, 2)
    assert seen.ready_in_s == pytest.approx(8.0, abs=0.5)
    backend, _ = backend_of(OVERLOADED, max_hold_s=5.0, known=status)
    with pytest.raises(Overloaded) as caught:
        await generate(backend)
    assert caught.value.retry_after_s == pytest.approx(8.0, abs=0.5)
    assert caught.value.work_s == pytest.approx(8.0 / 3)
    # The third replica does not count before it runs.
    soon = raised_by_replica(Overloaded("full.", None, 2.0, 8.0))
    backend, _ = backend_of(soon, max_hold_s=5.0, known=status)
    with pytest.raises(Overloaded) as caught:
        await generate(backend)
    assert (caught.value.retry_after_s, caught.value.work_s) == (pytest.approx(2.0, abs=0.1), 4.0)


async def test_a_silent_controller_delays_no_request(
    growing: Growing, caplog: pytest.LogCaptureFixture
) -> None:
    async def lost() -> Any:
        raise ActorDiedError

    backend, _ = backend_of(OVERLOADED, status=lost)
    with pytest.raises(Overloaded):
        await generate(backend)
    assert "does not report its replicas" in caplog.text


async def test_the_engine_decides_about_short_deadlines() -> None:
    """The API never answers 5xx to a very short deadline."""
    backend, _ = backend_of(InvalidRequest("deadline_s is too short.", "deadline_s"))
    with pytest.raises(InvalidRequest, match="too short"):
        await generate(backend, replace(PARAMS, deadline_s=5e-324))


async def test_the_wait_for_the_first_replica_is_limited() -> None:
    """The limit is the request's, on a new gateway too. The error has the start as retry time."""
    works: list[Callable[[ServeBackend], Awaitable[Any]]] = [
        generate,
        ServeBackend.describe,
        lambda backend: generate(backend, replace(PARAMS, deadline_s=0.02)),
        lambda backend: backend.describe(0.02),
    ]
    for work, max_hold_s in zip(works, (0.02, 0.02, 60.0, 60.0), strict=True):
        backend, [response] = backend_of(
            None, max_hold_s=max_hold_s, known=Replicas(no_replicas, 85.0)
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deployment, "FIRST_ANSWER_WITHIN_S", 0.02)
            with pytest.raises(Unavailable, match=r"no replica was ready within 0\.02 s") as caught:
                await asyncio.wait_for(work(backend), 5)
        assert caught.value.retry_after_s == 85.0
        assert response.cancelled


async def test_waiting_for_a_replica_is_no_part_of_generation() -> None:
    """A start may take longer than an image may, also the start of a replacement."""
    answers = [0.2, "queued"]
    backend, _ = backend_of([*answers, "image"], max_deadline_s=0.1)
    assert await generate(backend) == "image"
    backend, _ = backend_of([*answers, ActorDiedError()], [*answers, "image"], max_deadline_s=0.1)
    assert await generate(backend) == "image"


async def test_a_generation_that_takes_too_long_is_cancelled() -> None:
    """The limit counts the time on all replicas."""
    backend, [response] = backend_of(["queued", None], max_deadline_s=0.05)
    with pytest.raises(DeadlineExceeded, match=r"within 0\.05 s"):
        await generate(backend)
    assert response.cancelled
    lost = ["queued", 0.15, ActorDiedError()]
    backend, _ = backend_of(lost, [*lost[:2], "image"], max_deadline_s=0.2)
    with pytest.raises(DeadlineExceeded, match=r"within 0\.2 s"):
        await generate(backend)


async def test_a_start_is_measured_only_if_its_end_is_observed(growing: Growing) -> None:
    """Seen an hour later, the start may have ended at any time before."""
    now = 1e9
    status = Replicas(growing)
    growing.start_time_s = now - 9.0
    status.observe(await growing(), now)
    growing.grown = True
    status.observe(await growing(), now + 3_600)
    assert status.cold_start_s is None
    growing.grown = False
    status.observe(await growing(), now + 79.0)
    growing.grown = True
    status.observe(await growing(), now + 81.0)
    assert status.cold_start_s == 90.0


async def test_the_expected_rest_of_an_overdue_start_grows(
    growing: Growing,
) -> None:
    now = growing.start_time_s
    status = Replicas(growing)
    assert status.observe(await growing(), now + 20.0).ready_in_s == 40.0  # none was observed yet
    status.cold_start_s = 90.0
    estimates_s = [
        status.observe(await growing(), now + age_s).ready_in_s for age_s in (30, 81, 90, 120, 300)
    ]
    assert estimates_s == [60.0, 9.0, 18.0, 48.0, 228.0]


async def test_a_request_that_waits_for_the_first_replica_measures_its_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replicas, "REFRESH_EVERY_S", 0.01)
    started_at, running = time.time() - 9.0, False

    async def first() -> Any:
        state = "RUNNING" if running else "STARTING"
        return deployment_status(replica("a", state, started_at))

    for work in (generate, ServeBackend.describe):
        running = False
        known = Replicas(first)
        backend, _ = backend_of([0.2, "image"] if work is generate else [0.2], known=known)
        before = len(asyncio.all_tasks())
        task = asyncio.ensure_future(work(backend))
        await asyncio.sleep(0.1)
        running = True
        await task
        async with asyncio.timeout(5):
            while len(asyncio.all_tasks()) > before:  # the observation stops by itself
                await asyncio.sleep(0.01)
        assert known.cold_start_s is not None
