"""The estimate of a start's duration."""

import pytest

from serve_app.protocol.cold_start import smoothed_cold_start


def test_the_first_observation_replaces_the_assumption() -> None:
    assert smoothed_cold_start(None, 12.0) == 12.0


def test_repeated_observations_outweigh_an_exceptional_one() -> None:
    estimate_s = smoothed_cold_start(10.0, 100.0)
    assert 10 < estimate_s < 50
    for _ in range(20):
        estimate_s = smoothed_cold_start(estimate_s, 10.0)
    assert estimate_s == pytest.approx(10, rel=0.01)
