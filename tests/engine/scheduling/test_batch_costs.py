"""The batch size that serves the most requests per second, also of sizes that never ran."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.scheduling.batch_costs import NEARLY, TOLERANCE, BatchCosts
from serve_app.engine.scheduling.cost import CostModel, Measurement

SIZE, OTHER = (512, 512), (1024, 1024)


@given(st.lists(st.floats(0.01, 10.0), min_size=1, max_size=16), st.integers(1, 20))
def test_the_best_size_serves_the_most_requests_per_second(
    call_s: list[float], waiting: int
) -> None:
    costs = BatchCosts(call_s)
    best, size = costs.best[min(waiting, len(call_s)) - 1], costs.size(waiting)
    allowed = range(1, min(waiting, len(call_s)) + 1)
    assert {best, size} <= set(allowed)
    most = max(n / call_s[n - 1] for n in allowed)
    assert best / call_s[best - 1] * (1 + TOLERANCE) >= most
    assert size / call_s[size - 1] * (1 + TOLERANCE) >= (1 - NEARLY) * most
    if size > best:  # and then all of them take less time than one batch after the other
        assert size == waiting < 2 * best
        assert call_s[size - 1] < call_s[best - 1] + call_s[size - best - 1]


def test_a_few_that_would_be_left_over_run_with_the_others() -> None:
    """The demo model on two cores: a batch of six gains most, and one of eight nearly as much."""
    costs = BatchCosts([0.035, 0.049, 0.068, 0.087, 0.103, 0.119, 0.139, 0.165, 0.186])
    assert costs.best[5:] == (6, 6, 6, 6)
    assert costs.sizes[5:] == (6, 7, 8, 6)  # nine take as long as six and then three
    assert costs.pace == pytest.approx(0.165 / 0.035)
    assert costs.best_gain == pytest.approx(6 * 0.035 / 0.119)


def test_a_batch_that_gains_nothing_is_not_worth_a_longer_call() -> None:
    flat = BatchCosts([0.1 * size for size in range(1, 9)])
    assert flat.best == (1,) * 8
    assert flat.pace == 1


def test_a_larger_batch_may_lose_what_a_smaller_one_gains() -> None:
    costs = BatchCosts([1.0, 1.2, 1.4, 1.6, 4.0, 5.0])
    assert costs.best == (1, 2, 3, 4, 4, 4)
    assert costs.pace == pytest.approx(1.6)
    assert costs.best_gain == pytest.approx(4 / 1.6)


def test_a_batch_larger_than_any_known_one_is_tried_step_by_step() -> None:
    unknown = [0.1 * size for size in range(1, 17)]  # as predicted: it gains nothing
    assert BatchCosts(unknown, known=1).best == (1, *[2] * 15)
    assert BatchCosts(unknown, known=4).best == (1,) * 16  # four gain nothing: so would eight
    gains = [0.5 + 0.5 * size for size in range(1, 17)]
    assert BatchCosts(gains, known=4).best == (1, 2, 3, 4, 5, 6, 7, *[8] * 9)
    assert BatchCosts([0.0] * 4, known=0).best == (1, 2, 3, 4)


def learn(cost: CostModel, call_s: dict[int, float], waiting: int, calls: int) -> list[int]:
    """Run calls as a policy would; return the batch sizes."""
    sizes = []
    for _ in range(calls):
        size = cost.batches(SIZE).size(waiting)
        cost.observe_call(SIZE, size, size, call_s[size])
        sizes.append(size)
    return sizes


def test_an_engine_that_measured_single_calls_only_finds_the_full_batch() -> None:
    cost = CostModel(max_batch_size=16)
    cost.measured(SIZE, Measurement({1: 1.0}, encode_s=0.0, decode_s=0.0), capped=False)
    sizes = learn(cost, {size: 0.5 + 0.5 * size for size in range(1, 17)}, waiting=16, calls=40)
    assert sizes[:8] == [2, 2, 4, 4, 8, 8, 16, 16]  # the first call of a size teaches nothing
    assert sizes[-1] >= 14  # the others gain less than the tolerance


def test_an_engine_leaves_a_batch_that_turns_out_to_gain_nothing() -> None:
    cost = CostModel(max_batch_size=16)
    cost.measured(SIZE, Measurement({1: 1.0}, encode_s=0.0, decode_s=0.0), capped=False)
    sizes = learn(cost, {size: 1.0 * size for size in range(1, 17)}, waiting=16, calls=100)
    assert sizes[-20:] == [1] * 20


def test_one_slow_call_does_not_rule_out_a_batch_for_ever() -> None:
    cost = CostModel(max_batch_size=4)
    cost.measured(SIZE, Measurement({1: 1.0}, encode_s=0.0, decode_s=0.0), capped=False)
    call_s = {size: 0.5 + 0.5 * size for size in range(1, 5)}
    for _ in range(3):
        cost.observe_call(SIZE, 2, 2, 50.0)  # the device was busy with something else
        cost.observe_call(SIZE, 4, 4, 90.0)
    assert cost.batches(SIZE).size(4) == 1
    assert learn(cost, call_s, waiting=4, calls=700)[-1] == 4


def test_a_slow_phase_does_not_rule_out_a_batch_of_the_warm_up() -> None:
    cost = CostModel(max_batch_size=8)
    call_s = {size: 0.5 + 0.5 * size for size in range(1, 9)}
    measured = {size: call_s[size] for size in (1, 2, 4, 8)}
    cost.measured(SIZE, Measurement(measured, encode_s=0.0, decode_s=0.0))
    learn(cost, {size: 3 * seconds for size, seconds in call_s.items()}, waiting=8, calls=50)
    assert learn(cost, call_s, waiting=8, calls=1500)[-1] == 8


def test_a_device_that_gets_slower_or_faster_still_runs_full_batches() -> None:
    cost = CostModel(max_batch_size=8)
    call_s = {size: 0.5 + 0.5 * size for size in range(1, 9)}
    measured = {size: call_s[size] for size in (1, 2, 4, 8)}
    cost.measured(SIZE, Measurement(measured, encode_s=0.0, decode_s=0.0))
    sizes = []
    for pace in (1.0, 1.5, 1.0, 0.7, 1.2):  # as of a GPU that is too hot, or a shared CPU
        now_s = {size: pace * seconds for size, seconds in call_s.items()}
        sizes += learn(cost, now_s, waiting=8, calls=60)
        assert cost.predict_call(SIZE, 1) == pytest.approx(now_s[1], rel=0.1)
    assert set(sizes) == {8}


def test_what_a_batch_gains_is_learned_from_calls_of_several_sizes() -> None:
    cost = CostModel(max_batch_size=8)
    cost.measured(SIZE, Measurement({1: 1.0, 4: 2.5, 8: 4.5}, encode_s=0.0, decode_s=0.0))
    gains_nothing = {size: 0.5 + 0.5 * size for size in range(1, 5)} | {8: 6.0}
    for _ in range(100):
        for waiting in (4, 8):
            cost.observe_call(SIZE, waiting, waiting, gains_nothing[waiting])
    assert cost.batches(SIZE).size(8) == 4


def test_the_first_call_of_a_batch_size_may_be_slow() -> None:
    """It pays for memory and for the choice of kernels."""
    cost = CostModel(max_batch_size=16)
    cost.measured(SIZE, Measurement({1: 1.0}, encode_s=0.0, decode_s=0.0), capped=False)
    cold: set[int] = set()
    for _ in range(40):
        size = cost.batches(SIZE).size(16)
        cost.observe_call(SIZE, size, size, 0.5 + 0.5 * size + 8.0 * (size not in cold))
        cold.add(size)
    assert cost.batches(SIZE).size(16) >= 14


def test_an_engine_that_served_single_requests_finds_the_full_batch_as_fast() -> None:
    cost = CostModel(max_batch_size=16)
    cost.measured(SIZE, Measurement({1: 1.0}, encode_s=0.0, decode_s=0.0), capped=False)
    call_s = {size: 0.5 + 0.5 * size for size in range(1, 17)}
    learn(cost, call_s, waiting=1, calls=2000)
    assert learn(cost, call_s, waiting=16, calls=8) == [2, 2, 4, 4, 8, 8, 16, 16]


def test_a_batch_that_gains_is_not_forgotten_while_requests_come_alone() -> None:
    cost = CostModel(max_batch_size=4)
    cost.measured(SIZE, Measurement({1: 1.0}, encode_s=0.0, decode_s=0.0), capped=False)
    call_s = {size: 0.5 + 0.5 * size for size in range(1, 5)}
    learn(cost, call_s, waiting=4, calls=20)
    learn(cost, call_s, waiting=1, calls=2000)
    assert cost.batches(SIZE).size(4) == 4
    assert cost.predict_call(SIZE, 4) == 2.5


def test_clients_that_choose_ever_new_sizes_do_not_fill_the_memory() -> None:
    cost = CostModel(max_batch_size=4)
    for side in range(8, 8 * 2000, 8):
        for _ in range(17):
            cost.observe_call((side, 8), 1.0, 1, 1.0)
        cost.batches((side, 8))
    for name, value in vars(cost).items():
        if isinstance(value, dict):
            assert len(value) <= 600, name


def test_the_costs_follow_the_cap_and_include_the_time_between_calls() -> None:
    cost = CostModel(max_batch_size=8)
    cost.measured(SIZE, Measurement({1: 1.0, 8: 4.5}, encode_s=0.0, decode_s=0.0))
    cost.observe_between(SIZE, 0.25)
    assert cost.batches(SIZE).call_s == pytest.approx([0.5 + 0.75 * n for n in range(1, 9)])
    cost.lower_cap(SIZE, 8)
    assert len(cost.batches(SIZE).call_s) == 4
    assert len(cost.batches(OTHER).call_s) == 2  # the same memory
