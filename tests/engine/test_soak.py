"""A few seconds of the soak; ``python -m tests.benchmarks.soak`` runs for as long as one likes."""

import pytest

from tests.benchmarks.soak import soak

pytestmark = pytest.mark.slow


def test_nothing_is_lost_hung_or_wrong() -> None:
    report = soak(minutes=0.1, callers=8, seed=1)
    assert report.problems == []
    assert report.ends["completed"] > 0
    assert report.ends["cancelled"] > 0
