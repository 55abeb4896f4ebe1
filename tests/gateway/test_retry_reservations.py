"""A ``Retry-After`` that is kept: on a clock that the tests turn, and over HTTP."""

import functools
from dataclasses import dataclass

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
from tests.gateway.conftest import CONFIG, FakeBackend, error_of, post


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """By which an API that is made later keeps its promises."""
    clock = Clock()
    monkeypatch.setattr(images, "RetryReservations", functools.partial(RetryReservations, clock))
    return clock


def refusal(room_in_s: float = 0.0, work_s: float = 1.0) -> Overloaded:
    return Overloaded("full.", "deadline_s", room_in_s, work_s)


def wait_s(error: Overloaded) -> float:
    assert error.retry_after_s is not None
    return error.retry_after_s


def test_who_is_told_a_time_is_known_then_and_not_before() -> None:
    clock = Clock()
    reservations = RetryReservations(clock)
    told = reservations.reserve(b"a", refusal(room_in_s=6.2), is_retry=False)
    assert (told.retry_after_s, told.param) == (7.0, "deadline_s")
    assert str(told) == "full. There will be room in 7 s."
    clock.now += 6.9
    assert not reservations.redeem(b"a")
    clock.now += 0.1
    assert not reservations.redeem(b"b")
    assert reservations.redeem(b"a")
    assert not reservations.redeem(b"a")


def test_whoever_is_told_later_comes_after_those_before() -> None:
    reservations = RetryReservations(Clock())
    waits = [wait_s(reservations.reserve(b"%d" % n, refusal(5.0, 7.0), False)) for n in range(4)]
    assert waits == [5, 15, 25, 35]  # seven tenths of the time are promised
    assert PACE == 0.7


def test_it_never_says_at_once() -> None:
    assert wait_s(RetryReservations(Clock()).reserve(b"a", refusal(0.0, 0.0), False)) == 1


def test_what_was_promised_within_a_time() -> None:
    clock = Clock()
    reservations = RetryReservations(clock)
    for n in range(3):
        reservations.reserve(b"%d" % n, refusal(2.0, 7.0), False)
    assert [reservations.due_within_s(s) for s in (1.0, 2.0, 12.0, 100.0)] == [0, 7, 14, 21]
    clock.now += 2.0
    assert reservations.due_within_s(0.0) == 7
    assert reservations.redeem(b"0")
    assert reservations.due_within_s(0.0) == 0


def test_who_does_not_come_loses_the_place_and_counts_less() -> None:
    clock = Clock()
    reservations = RetryReservations(clock)
    for n in range(200):
        reservations.reserve(b"%d" % n, refusal(0.0, 0.0), False)
        clock.now += 10.0
    assert reservations.due_within_s(1e9) == 0
    first, second = (reservations.reserve(name, refusal(1.0, 90.0), False) for name in (b"x", b"y"))
    assert wait_s(second) < wait_s(first) + 15  # of 100: hardly anybody comes
    clock.now += 1.0
    assert reservations.redeem(b"x")


def test_who_came_as_told_and_found_no_room_need_not_stand_in_line_again() -> None:
    reservations = RetryReservations(Clock())
    for n in range(4):
        reservations.reserve(b"%d" % n, refusal(0.0, 7.0), False)
    assert wait_s(reservations.reserve(b"a", refusal(3.0, 7.0), is_retry=True)) == 3
    assert wait_s(reservations.reserve(b"b", refusal(0.0, 7.0), is_retry=False)) == 50


def test_the_same_wish_twice_has_two_places() -> None:
    clock = Clock()
    reservations = RetryReservations(clock)
    for _ in range(2):
        reservations.reserve(b"a", refusal(), False)
    clock.now += 3.0
    assert [reservations.redeem(b"a") for _ in range(3)] == [True, True, False]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RESERVATIONS", 3)
    clock = Clock()
    reservations = RetryReservations(clock)
    waits = [wait_s(reservations.reserve(b"%d" % n, refusal(), False)) for n in range(5)]
    assert waits == sorted(waits)  # told all the same
    clock.now += waits[4]
    assert [reservations.redeem(b"%d" % n) for n in range(5)] == [True, True, True, False, False]


@given(
    st.lists(
        st.tuples(st.floats(0, 20), st.floats(0, 5), st.floats(0, 3), st.booleans()), max_size=40
    )
)
def test_nobody_is_forgotten_and_all_is_forgotten_in_the_end(
    told: list[tuple[float, float, float, bool]],
) -> None:
    clock = Clock()
    reservations = RetryReservations(clock)
    due = []
    for n, (room_in_s, work_s, pause_s, comes) in enumerate(told):
        wait = wait_s(reservations.reserve(b"%d" % n, refusal(room_in_s, work_s), False))
        assert wait >= max(1, room_in_s)
        if comes:
            due.append((clock.now + wait, b"%d" % n))
        clock.now += pause_s
    for due_at, name in sorted(due):
        clock.now = max(clock.now, due_at)
        if clock.now < due_at + 5:
            assert reservations.redeem(name)
    clock.now += 1e4
    assert reservations.due_within_s(1e9) == 0
    assert not reservations._by_fingerprint


def test_fingerprints_tell_apart_where_parts_end() -> None:
    assert fingerprint([b"ab", b"c"]) != fingerprint([b"a", b"bc"])


@pytest.mark.anyio
async def test_a_refused_request_that_comes_again_is_known(
    clock: Clock, client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    body = {"prompt": "x", "num_inference_steps": 5, "n": 2}
    backend.error = refusal(room_in_s=2.5, work_s=7.0)
    response = await post(client, body)
    assert error_of(response, 429)["code"] == "overloaded"
    assert response.headers["retry-after"] == "3"
    # Both images of it go before the next one.
    response = await post(client, body | {"seed": 1})
    assert response.headers["retry-after"] == str(3 + 20)
    assert {context.is_retry for context in backend.contexts} == {False}
    assert len({context.order for context in backend.contexts}) == 2
    backend.contexts.clear()
    backend.error = None
    clock.now += 3.0
    assert (await post(client, body | {"n": 1})).status_code == 200
    assert not backend.contexts[-1].is_retry  # another one
    assert backend.contexts[-1].reserved_s == 28
    assert (await post(client, body)).status_code == 200
    assert [context.is_retry for context in backend.contexts] == [False, True, True]
    assert backend.contexts[-1].reserved_s == 0
    assert len({params.seed for params in backend.asked}) > 4  # drawn anew


@pytest.mark.anyio
async def test_a_stream_that_is_refused_is_known_as_well(
    clock: Clock, client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.error = refusal(room_in_s=2.0)
    body = {"prompt": "x", "stream": True}
    assert (await post(client, body)).headers["retry-after"] == "2"
    backend.error = None
    clock.now += 2.0
    assert (await post(client, body)).status_code == 200
    assert backend.contexts[-1].is_retry


@pytest.mark.anyio
async def test_each_key_has_its_own_promises_and_its_priority(
    clock: Clock, backend: FakeBackend
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

        backend.error = refusal(room_in_s=4.0, work_s=90.0)
        assert (await ask("app")).headers["retry-after"] == "4"
        # Another class, another line.
        assert (await ask("nightly")).headers["retry-after"] == "4"
        assert [params.priority for params in backend.asked] == ["interactive", "batch"]
        backend.error = None
        clock.now += 4.0
        for key in ("other", "app", "nightly"):
            assert (await ask(key)).status_code == 200
        assert [context.is_retry for context in backend.contexts[2:]] == [False, True, True]
