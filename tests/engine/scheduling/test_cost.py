"""Predictions and batch caps come from measurements."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.scheduling.cost import CostModel, Measurement, worthwhile_batch

SMALL, LARGE = (512, 512), (1024, 1024)


def linear(fixed_s: float, per_row_s: float) -> dict[int, float]:
    return {batch: fixed_s + per_row_s * batch for batch in (1, 2, 4, 8, 16)}


def measurement(call_s: dict[int, float]) -> Measurement:
    return Measurement(call_s, encode_s=0.5, decode_s=3.0)


@pytest.mark.parametrize(
    ("call_s", "batch"),
    [
        ({1: 1.0}, 1),
        ({1: 1.0, 2: 2.0, 4: 4.0}, 1),  # no gain
        ({1: 1.0, 2: 1.0, 4: 1.0}, 4),  # no cost
        (linear(1.0, 1.0), 16),  # 16 generate 6 % more per second than 8
        (linear(0.5, 1.0), 8),  # 16 would gain 3 %
        ({1: 1.0, 2: 2.0, 4: 1.0}, 1),  # stops at the first step that does not pay
    ],
)
def test_the_largest_batch_that_pays_is_worthwhile(call_s: dict[int, float], batch: int) -> None:
    assert worthwhile_batch(call_s) == batch


def test_caps_of_other_sizes_scale_by_pixels() -> None:
    cost = CostModel(max_batch_size=16)
    assert cost.cap(SMALL) == 16  # nothing is known
    cost.measured(SMALL, measurement(linear(0.5, 1.0)))
    assert cost.cap(SMALL) == 8
    assert cost.cap(LARGE) == 2
    assert cost.cap((2048, 2048)) == 1
    assert cost.cap((64, 64)) == 16
    assert cost.cap(SMALL, within_s=4.6) == 4
    assert cost.cap(SMALL, rows=0.5, within_s=4.6) == 8  # half the rows without guidance
    assert cost.cap(SMALL, within_s=0.1) == 1


def test_a_cap_recovers_from_a_lack_of_memory() -> None:
    cost = CostModel(max_batch_size=16)
    cost.measured(SMALL, measurement(linear(0.5, 1.0)))
    assert cost.lower_cap(SMALL, 7) == 3
    assert cost.cap(SMALL) == 3
    assert cost.cap(LARGE) == 2  # memory did not run out at that size
    for _ in range(99):
        cost.observe_call(SMALL, 3.0, 3, 3.5)
        cost.observe_call(SMALL, 2.0, 2, 2.5)  # a smaller batch proves nothing
    assert cost.cap(SMALL) == 3
    cost.observe_call(SMALL, 3.0, 3, 3.5)
    assert cost.cap(SMALL) == 4
    for requests in range(4, 12):
        for _ in range(100):
            cost.observe_call(SMALL, requests, requests, 0.5 + requests)
    assert cost.cap(SMALL) == 8  # the worthwhile batch
    assert cost.lower_cap(SMALL, 1) == 1


def test_predictions_come_from_measurements() -> None:
    cost = CostModel(max_batch_size=16)
    for predicted_s in (cost.predict_steps(SMALL, 20), cost.predict_encode(SMALL)):
        assert predicted_s == 0.0
    assert cost.predict_decode(SMALL) == cost.predict_stage("vae", SMALL) == 0.0
    cost.measured(SMALL, measurement(linear(0.5, 1.0)))
    assert cost.predict_call(SMALL, 2.0) == 2.5
    assert cost.predict_call(SMALL, 3.0) == pytest.approx(3.5)
    assert cost.predict_call(SMALL, 32.0) == pytest.approx(33.0)
    assert 0.75 <= cost.predict_call(SMALL, 0.5) <= 1.5
    assert cost.predict_call(LARGE, 1.0) == pytest.approx(4.5)  # like four small calls
    assert cost.predict_steps(SMALL, 10) == pytest.approx(15.0)
    cost.observe_between(SMALL, 0.5)
    assert cost.predict_steps(SMALL, 10) == pytest.approx(20.0)
    assert cost.predict_encode(SMALL) == cost.predict_encode(LARGE) == 0.5  # no pixels
    assert cost.predict_decode(SMALL) == 3.0
    assert cost.predict_decode(LARGE) == 12.0
    cost.observe_stage("vae", SMALL, 1.0)
    assert cost.predict_stage("vae", LARGE) == 4.0


def test_predictions_follow_the_device() -> None:
    cost = CostModel(max_batch_size=16)
    cost.measured(SMALL, measurement({1: 1.0}))
    for _ in range(60):
        cost.observe_call(SMALL, 1.0, 1, 2.0)
        cost.observe_request(SMALL, steps=5, calls=10, encode_s=1.0, decode_s=2.0)
    assert cost.predict_call(SMALL) == pytest.approx(2.0, rel=0.01)
    assert cost.predict_steps(SMALL, 5) == pytest.approx(20.0, rel=0.01)  # two calls per step
    assert cost.predict_encode(SMALL) == pytest.approx(1.0, rel=0.01)
    assert cost.predict_decode(SMALL) == pytest.approx(2.0, rel=0.01)


@given(
    st.dictionaries(st.integers(1, 16), st.floats(0.01, 10), min_size=1),
    st.floats(0.5, 64),
    st.sampled_from([(64, 64), SMALL, LARGE]),
)
def test_predictions_are_positive(
    call_s: dict[int, float], rows: float, size: tuple[int, int]
) -> None:
    cost = CostModel(max_batch_size=16)
    cost.measured(SMALL, measurement(call_s))
    assert cost.predict_call(size, rows) > 0
    assert 1 <= cost.cap(size) <= 16


def test_measurements_survive_json() -> None:
    cost = CostModel(max_batch_size=16)
    cost.measured(SMALL, measurement(linear(0.5, 1.0)))
    cost.measured((256, 256), measurement({1: 0.5}), capped=False)
    cost.measured(LARGE, Measurement({1: 4.0}, 0.5, 3.0, out_of_memory=True))
    cost.observe_call((64, 64), 1.5, 2, 7.0)
    again = CostModel(max_batch_size=16)
    again.add_json(json.loads(json.dumps(cost.to_json())))
    # Without times under load, and without caps set by a lack of memory.
    assert again.call_s == {SMALL: cost.call_s[SMALL], (256, 256): {1.0: 0.5}}
    assert again.caps == {SMALL: 8}
    assert again.encode_s == {SMALL: 0.5, (256, 256): 0.5}
    assert again.decode_s == {SMALL: 3.0, (256, 256): 3.0}
    for wrong in ({"size": 3}, {}, cost.to_json()[0] | {"call_s": []}):
        with pytest.raises((ValueError, KeyError, TypeError)):
            again.add_json([wrong])


def test_clients_cannot_fill_the_memory_with_sizes() -> None:
    cost = CostModel(max_batch_size=16)
    cost.measured(SMALL, measurement(linear(0.5, 1.0)))
    for side in range(8, 8 * 1000, 8):
        cost.observe_call((side, 8), 1.0, 1, 1.0)
        cost.observe_stage("vae", (side, 8), 1.0)
        cost.observe_request((side, 8), 10, 10, 1.0, 1.0)
    for known in (cost.call_s, cost.encode_s, cost.decode_s, cost.stage_s["vae"]):
        assert len(known) <= 256
    assert SMALL in cost.call_s
    assert SMALL in cost.decode_s
