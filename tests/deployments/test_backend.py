"""The backend behind a Serve handle, with scripted answers of the handle."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError
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
from serve_app.protocol.params import GenerationParams
from tests.fakes.serve_handle import (
    DEPLOYMENT,
    Growing,
    backend_of,
    no_replicas,
    raised_by_replica,
)
from tests.fakes.serve_status import replica

pytestmark = pytest.mark.anyio

PARAMS = GenerationParams("x", 1)


def waiting_for_replica(model: str = "demo") -> float | None:
    name = "diffusion_serve_requests_waiting_for_replica"
    return GATEWAY.get_sample_value(name, {"model": model})


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


async def test_a_replica_that_stops_is_not_tried_again_before_it_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is idle, so that a router would choose it for every attempt."""
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(deployment, "STOPPING_S", 7.0)
    backend, _ = backend_of(*[raised_by_replica(Unavailable("closing"))] * 2, "image")
    monkeypatch.setattr(deployment.asyncio, "sleep", pause)
    assert await generate(backend) == "image"
    assert [seconds for seconds in pauses if seconds] == [7.0, 7.0]


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


OVERLOADED = raised_by_replica(Overloaded("full.", None, 40.0, 8.0))


async def test_a_rejected_request_waits_for_a_starting_replica(growing: Growing) -> None:
    """It counts for its model only."""
    backend_of(model="other")
    backend, responses = backend_of(OVERLOADED, "image", status=growing)
    task = asyncio.ensure_future(generate(backend))
    while growing.calls < 5:
        await asyncio.sleep(0)
    assert not task.done()
    assert (waiting_for_replica(), waiting_for_replica("other")) == (1, 0)
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
            assert caught.value.retry_after_s == pytest.approx(min(0.12, room_in_s - 0.2), abs=0.1)
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
        both = [replica("a"), replica("b"), started]
        return SimpleNamespace(replicas=both, target_num_replicas=4)

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
            with pytest.raises(
                Unavailable, match=r"no replica was ready within 0\.02\d* s"
            ) as caught:
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


async def test_a_request_that_waits_for_the_first_replica_measures_its_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replicas, "REFRESH_EVERY_S", 0.01)
    started_at, running = time.time() - 9.0, False

    async def first() -> Any:
        state = "RUNNING" if running else "STARTING"
        return SimpleNamespace(replicas=[replica("a", state, started_at)], target_num_replicas=1)

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
