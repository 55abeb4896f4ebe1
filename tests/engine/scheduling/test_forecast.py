"""Forecasts of completion times, on a simulated clock."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import pytest

from serve_app.engine.scheduling.cost import CostModel, Measurement, Size
from serve_app.engine.scheduling.forecast import Forecast, Work
from serve_app.engine.scheduling.on_time import OnTime
from serve_app.engine.scheduling.queue import QueueEntry
from tests.engine.scheduling.simulated_device import MeasuredCosts

SMALL, LARGE = (512, 512), (1024, 1024)


def model() -> CostModel:
    """Return costs: a small call takes 1 s plus 1 s per request, a large call four times that."""
    cost = CostModel(max_batch_size=16)
    for size, scale in ((SMALL, 1.0), (LARGE, 4.0)):
        call_s = {batch: scale * (1 + batch) for batch in (1, 2, 4, 8, 16)}
        cost.measured(size, Measurement(call_s, encode_s=1.0, decode_s=2.0 * scale))
        cost.caps[size] = 4
    return cost


def work(size: Size = SMALL, calls: float = 10, **options: float) -> Work:
    return Work(size, size, 1.0, calls, options.get("encode_s", 1.0), options.get("decode_s", 2.0))


def test_a_single_request_takes_the_sum_of_its_parts() -> None:
    one = work()
    assert Forecast(model()).predict_s([one], one) == pytest.approx(1 + 10 * 2 + 2)


def test_a_merged_request_delays_the_others_little() -> None:
    one, others = work(), [work(calls=20, encode_s=0.0) for _ in range(2)]
    assert Forecast(model()).predict_s([one, *others], one) == pytest.approx(1 + 10 * 4 + 2)


def test_an_earlier_request_of_another_size_takes_its_full_time() -> None:
    first, one = work(LARGE, calls=5, encode_s=0.0, decode_s=8.0), work()
    expected_s = 1 + 5 * 8 + 8 + 10 * 2 + 2
    assert Forecast(model()).predict_s([first, one], one) == pytest.approx(expected_s)
    one = work()
    later = work(LARGE, calls=5, encode_s=0.0)
    assert Forecast(model()).predict_s([one, later], one) == pytest.approx(1 + 10 * 2 + 2)


def test_a_batch_stays_within_its_cap() -> None:
    five = [work(encode_s=0.0, decode_s=0.0) for _ in range(5)]
    assert Forecast(model()).predict_s(five, five[4]) == pytest.approx(10 * 5 + 10 * 2)


def test_the_forecast_learns_its_bias() -> None:
    forecast = Forecast(model())
    assert forecast.error is None
    assert forecast.observe(0.0, 3.0) is None  # no prediction
    for _ in range(200):
        one = work()
        forecast.observe(forecast.predict_s([one], one), 1.5 * 23)
    one = work()
    assert forecast.predict_s([one], one) == pytest.approx(1.5 * 23, rel=0.01)
    assert forecast.error is not None
    assert forecast.error < 0.02


@dataclass
class Request:
    """A request inside the simulated engine."""

    entry: QueueEntry
    size: Size
    at: float
    calls: int
    predicted_s: float = 0.0


def simulate(load: float, count: int = 600) -> Forecast:
    """Simulate a device with the costs of `model`, within a tenth, under Poisson arrivals."""
    rng = Random(1)
    cost, policy = model(), OnTime()
    costs = MeasuredCosts(cost)
    forecast = Forecast(cost)
    calls = {SMALL: 20, LARGE: 25}
    solo_s = {
        size: cost.predict_encode(size) + cost.predict_steps(size, n) + cost.predict_decode(size)
        for size, n in calls.items()
    }
    mean_s = 0.6 * solo_s[SMALL] + 0.4 * solo_s[LARGE]
    arrivals = []
    at = 0.0
    for _ in range(count):
        at += rng.expovariate(load / mean_s)
        arrivals.append((at, SMALL if rng.random() < 0.6 else LARGE))
    inside: dict[int, Request] = {}
    now, number = 0.0, 0

    def predict(target: Request) -> float:
        order = [inside[entry.request] for entry in policy.order(now)]
        works = [work(one.size, one.calls, encode_s=0, decode_s=cost.predict_decode(one.size))
                 for one in order]  # fmt: skip
        return forecast.predict_s(works, works[order.index(target)])

    while arrivals or inside:
        if not inside:
            now = max(now, arrivals[0][0])
        while arrivals and arrivals[0][0] <= now:
            at, size = arrivals.pop(0)
            number += 1
            entry = QueueEntry(number, at + 3 * solo_s[size], solo_s[size], size, arrived_at=at)
            inside[number] = Request(entry, size, now, calls[size])
            policy.add(entry)
            inside[number].predicted_s = cost.predict_encode(size) + predict(inside[number])
            now += cost.predict_encode(size)
            entry.step_s = cost.predict_call(size)
            policy.park(entry)
        batch = policy.choose(now, costs)
        size = inside[batch[0].request].size
        now += cost.predict_call(size, len(batch)) * rng.uniform(0.9, 1.1)
        for entry in batch:
            request = inside[entry.request]
            request.calls -= 1
            if request.calls:
                steps_s = cost.predict_steps(size, request.calls)
                entry.remaining_s = steps_s + cost.predict_decode(size)
                policy.park(entry)
            else:
                now += cost.predict_decode(size)
                forecast.observe(request.predicted_s, now - request.at)
                policy.drop(entry)
                del inside[entry.request]
    return forecast


@pytest.mark.parametrize("load", [0.5, 0.7])
def test_the_median_error_is_under_15_percent_at_steady_load(
    load: float, report: Callable[[str], None]
) -> None:
    error = simulate(load).error
    assert error is not None
    report(f"simulated, load {load}: median error of the predicted end {error:.0%}")
    assert error < 0.15
