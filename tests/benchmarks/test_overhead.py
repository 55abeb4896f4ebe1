"""What the engine adds to a step does not grow with the number of requests, counted in calls."""

import pytest

from tests.benchmarks.overhead import SHORT, calls_per_step, cheap_pipeline, engine_on, with_engine

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("batch", [1, pytest.param(8, marks=pytest.mark.nightly)])
def test_a_step_costs_no_more_among_many_requests(batch: int) -> None:
    with engine_on(cheap_pipeline(), batch) as engine:
        with_engine(engine, 64, SHORT)
        few, many = calls_per_step(engine, 8), calls_per_step(engine, 64)
    assert many < 1.1 * few
