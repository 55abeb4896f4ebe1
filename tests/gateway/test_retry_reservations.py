"""A ``Retry-After`` that is kept: on a clock that the tests turn, and over HTTP."""

import functools

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import Overloaded
from serve_app.gateway import retry_reservations as module
from serve_app.gateway import service as images
from serve_app.gateway.auth import KeyRing, digest
from serve_app.gateway.retry_reservations import PACE, RetryReservations, fingerprint
from serve_app.gateway.routes import create_api
from tests.fakes.backend import CONFIG, FakeBackend
from tests.fakes.clock import ManualClock
from tests.gateway.conftest import error_of, post


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    """Clock of the reservations in every API that is made later."""
    clock = ManualClock()
    monkeypatch.setattr(
        images, "RetryReservations", functools.partial(RetryReservations, clock.now)
    )
    return clock


def rejection(room_in_s: float = 0.0, work_s: float = 1.0) -> Overloaded:
    return Overloaded("full.", "deadline_s", room_in_s, work_s)


def wait_s(error: Overloaded) -> float:
    assert error.retry_after_s is not None
    return error.retry_after_s


def test_a_reservation_is_redeemed_when_due_and_not_before() -> None:
    clock = ManualClock()
    reservations = RetryReservations(clock.now)
    rejected = reservations.reserve(b"a", rejection(room_in_s=6.2), is_retry=False)
    assert (rejected.retry_after_s, rejected.param) == (7.0, "deadline_s")
    assert str(rejected) == "full. There will be room in 7 s."
    clock.advance(6.9)
    assert not reservations.redeem(b"a")
    clock.advance(0.1)
    assert not reservations.redeem(b"b")
    assert reservations.redeem(b"a")
    assert not reservations.redeem(b"a")


def test_later_reservations_are_due_after_earlier_ones() -> None:
    reservations = RetryReservations(ManualClock().now)
    waits = [wait_s(reservations.reserve(b"%d" % n, rejection(5.0, 7.0), False)) for n in range(4)]
    assert waits == [5, 15, 25, 35]  # seven tenths of the time are reserved
    assert PACE == 0.7


def test_a_retry_time_is_at_least_a_second() -> None:
    assert (
        wait_s(RetryReservations(ManualClock().now).reserve(b"a", rejection(0.0, 0.0), False)) == 1
    )


def test_the_reserved_work_within_a_time() -> None:
    clock = ManualClock()
    reservations = RetryReservations(clock.now)
    for n in range(3):
        reservations.reserve(b"%d" % n, rejection(2.0, 7.0), False)
    assert [reservations.due_within_s(s) for s in (1.0, 2.0, 12.0, 100.0)] == [0, 7, 14, 21]
    clock.advance(2.0)
    assert reservations.due_within_s(0.0) == 7
    assert reservations.redeem(b"0")
    assert reservations.due_within_s(0.0) == 0


def test_unredeemed_reservations_expire_and_lower_the_expected_share() -> None:
    clock = ManualClock()
    reservations = RetryReservations(clock.now)
    for n in range(200):
        reservations.reserve(b"%d" % n, rejection(0.0, 0.0), False)
        clock.advance(10.0)
    assert reservations.due_within_s(1e9) == 0
    first, second = (
        reservations.reserve(name, rejection(1.0, 90.0), False) for name in (b"x", b"y")
    )
    assert wait_s(second) < wait_s(first) + 15  # of 100: few reservations are redeemed
    clock.advance(1.0)
    assert reservations.redeem(b"x")


def test_a_retry_without_room_does_not_wait_behind_the_others_again() -> None:
    reservations = RetryReservations(ManualClock().now)
    for n in range(4):
        reservations.reserve(b"%d" % n, rejection(0.0, 7.0), False)
    assert wait_s(reservations.reserve(b"a", rejection(3.0, 7.0), is_retry=True)) == 3
    assert wait_s(reservations.reserve(b"b", rejection(0.0, 7.0), is_retry=False)) == 50


def test_two_equal_requests_have_two_reservations() -> None:
    clock = ManualClock()
    reservations = RetryReservations(clock.now)
    for _ in range(2):
        reservations.reserve(b"a", rejection(), False)
    clock.advance(3.0)
    assert [reservations.redeem(b"a") for _ in range(3)] == [True, True, False]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RESERVATIONS", 3)
    clock = ManualClock()
    reservations = RetryReservations(clock.now)
    waits = [wait_s(reservations.reserve(b"%d" % n, rejection(), False)) for n in range(5)]
    assert waits == sorted(waits)  # all have a retry time
    clock.advance(waits[4])
    assert [reservations.redeem(b"%d" % n) for n in range(5)] == [True, True, True, False, False]


@given(
    st.lists(
        st.tuples(st.floats(0, 20), st.floats(0, 5), st.floats(0, 3), st.booleans()), max_size=40
    )
)
def test_reservations_are_kept_until_due_and_expire_in_the_end(
    rejections: list[tuple[float, float, float, bool]],
) -> None:
    clock = ManualClock()
    reservations = RetryReservations(clock.now)
    due = []
    for n, (room_in_s, work_s, pause_s, comes) in enumerate(rejections):
        wait = wait_s(reservations.reserve(b"%d" % n, rejection(room_in_s, work_s), False))
        assert wait >= max(1, room_in_s)
        if comes:
            due.append((clock.now() + wait, b"%d" % n))
        clock.advance(pause_s)
    for due_at, name in sorted(due):
        clock.advance_to(due_at)
        if clock.now() < due_at + 5:
            assert reservations.redeem(name)
    clock.advance(1e4)
    assert reservations.due_within_s(1e9) == 0
    assert len(reservations) == 0


def test_fingerprints_depend_on_the_boundaries_of_parts() -> None:
    assert fingerprint([b"ab", b"c"]) != fingerprint([b"a", b"bc"])


@pytest.mark.anyio
async def test_the_retry_of_a_rejected_request_is_recognised(
    clock: ManualClock, client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    body = {"prompt": "x", "num_inference_steps": 5, "n": 2}
    backend.error = rejection(room_in_s=2.5, work_s=7.0)
    response = await post(client, body)
    assert error_of(response, 429)["code"] == "overloaded"
    assert response.headers["retry-after"] == "3"
    # Both of its images go before the next request.
    response = await post(client, body | {"seed": 1})
    assert response.headers["retry-after"] == str(3 + 20)
    assert {context.is_retry for context in backend.contexts} == {False}
    assert len({context.order for context in backend.contexts}) == 2
    backend.contexts.clear()
    backend.error = None
    clock.advance(3.0)
    assert (await post(client, body | {"n": 1})).status_code == 200
    assert not backend.contexts[-1].is_retry  # another request
    assert backend.contexts[-1].reserved_s == 28
    assert (await post(client, body)).status_code == 200
    assert [context.is_retry for context in backend.contexts] == [False, True, True]
    assert backend.contexts[-1].reserved_s == 0
    assert len({params.seed for params in backend.received}) > 4  # drawn anew


@pytest.mark.anyio
async def test_the_retry_of_a_rejected_stream_is_recognised(
    clock: ManualClock, client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.error = rejection(room_in_s=2.0)
    body = {"prompt": "x", "stream": True}
    assert (await post(client, body)).headers["retry-after"] == "2"
    backend.error = None
    clock.advance(2.0)
    assert (await post(client, body)).status_code == 200
    assert backend.contexts[-1].is_retry


@pytest.mark.anyio
async def test_each_key_has_its_own_reservations_and_its_priority(
    clock: ManualClock, backend: FakeBackend
) -> None:
    keys = KeyRing(
        None,
        f"- {{name: app, sha256: {digest('sk-app')}}}\n"
        f"- {{name: other, sha256: {digest('sk-other')}}}\n"
        f"- {{name: nightly, sha256: {digest('sk-nightly')}, priority: batch}}\n",
    )
    transport = httpx.ASGITransport(create_api(CONFIG, backend, keys))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

        async def ask(key: str) -> httpx.Response:
            return await client.post(
                "/v1/images/generations",
                json={"prompt": "x"},
                headers={"authorization": f"Bearer sk-{key}"},
            )

        backend.error = rejection(room_in_s=4.0, work_s=90.0)
        assert (await ask("app")).headers["retry-after"] == "4"
        # Each priority has its own reservations.
        assert (await ask("nightly")).headers["retry-after"] == "4"
        assert [params.priority for params in backend.received] == ["interactive", "batch"]
        backend.error = None
        clock.advance(4.0)
        for key in ("other", "app", "nightly"):
            assert (await ask(key)).status_code == 200
        assert [context.is_retry for context in backend.contexts[2:]] == [False, True, True]
