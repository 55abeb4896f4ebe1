"""The retry time of errors as clients receive it."""

import pytest

from serve_app.errors import (
    Cancelled,
    DeadlineExceeded,
    DiffusionServeError,
    GenerationFailed,
    InvalidRequest,
    NotFinite,
    Overloaded,
    RateLimited,
    Unavailable,
)
from serve_app.gateway.retry_after import documented_headers, retry_headers, whole_seconds


@pytest.mark.parametrize(
    ("retry_after_s", "seconds"), [(0.0, 1), (0.2, 1), (1.0, 1), (1.01, 2), (90.5, 91), (None, 5)]
)
def test_retry_times_are_whole_seconds_rounded_up(
    retry_after_s: float | None, seconds: int
) -> None:
    assert whole_seconds(retry_after_s) == seconds


@pytest.mark.parametrize("kind", [Overloaded, RateLimited, Unavailable])
def test_a_rejection_has_a_retry_time(kind: type[DiffusionServeError]) -> None:
    assert retry_headers(kind("full", retry_after_s=2.5)) == {"Retry-After": "3"}
    assert documented_headers(kind.status)


@pytest.mark.parametrize("kind", [InvalidRequest, Cancelled, DeadlineExceeded, NotFinite])
def test_an_error_that_a_retry_repeats_says_so(kind: type[DiffusionServeError]) -> None:
    assert retry_headers(kind("no", retry_after_s=2.5)) == {"x-should-retry": "false"}
    assert not documented_headers(kind.status)


def test_a_server_error_leaves_the_decision_to_the_client() -> None:
    assert retry_headers(GenerationFailed("broken")) == {}
