from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.scheduler import Candidate, Fifo

candidates = st.lists(
    st.builds(
        Candidate,
        request=st.integers(1, 1_000),
        key=st.sampled_from(["64", "96", None]),
        parked_at=st.integers(0, 20),
    ),
    min_size=1,
    max_size=40,
    unique_by=lambda candidate: candidate.request,
)


@given(candidates, st.integers(1, 8))
def test_what_is_chosen_may_run_together(parked: list[Candidate], cap: int) -> None:
    chosen = Fifo().choose(parked, cap)
    assert 1 <= len(chosen) <= cap
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= set(parked)
    keys = {candidate.key for candidate in chosen}
    assert len(keys) == 1
    assert len(chosen) == 1 or None not in keys
    assert min(c.parked_at for c in parked) == chosen[0].parked_at


@given(candidates, st.integers(1, 8))
def test_a_batch_is_as_full_as_it_can_be(parked: list[Candidate], cap: int) -> None:
    chosen = Fifo().choose(parked, cap)
    key = chosen[0].key
    same = [candidate for candidate in parked if candidate.key == key]
    assert len(chosen) == (1 if key is None else min(cap, len(same)))


def _run(steps: dict[int, int], keys: dict[int, str | None], cap: int) -> list[list[int]]:
    """Drive the policy as the engine does, until every request has had its steps."""
    left = dict(steps)
    parked_at = dict.fromkeys(steps, 0)
    ticks: list[list[int]] = []
    while left:
        parked: Sequence[Candidate] = [Candidate(r, keys[r], parked_at[r]) for r in left]
        chosen = [candidate.request for candidate in Fifo().choose(parked, cap)]
        ticks.append(chosen)
        for request in chosen:
            parked_at[request] = len(ticks)
            left[request] -= 1
            if not left[request]:
                del left[request]
    return ticks


@given(
    st.dictionaries(st.integers(1, 30), st.integers(1, 6), min_size=1, max_size=12),
    st.integers(1, 5),
    st.data(),
)
def test_nothing_is_lost_twice_or_starved(
    steps: dict[int, int], cap: int, data: st.DataObject
) -> None:
    keys = {r: data.draw(st.sampled_from(["a", "b", None])) for r in steps}
    ticks = _run(steps, keys, cap)
    done = [request for tick in ticks for request in tick]
    assert sorted(done) == sorted(r for r, count in steps.items() for _ in range(count))
    # Between two turns of a request, nobody else gets more than two.
    for request in steps:
        turns = [index for index, tick in enumerate(ticks) if request in tick]
        for before, after in pairwise(turns):
            between = [r for tick in ticks[before + 1 : after] for r in tick]
            assert all(between.count(other) <= 2 for other in steps)


def test_sizes_take_turns() -> None:
    keys: dict[int, str | None] = {1: "64", 2: "64", 3: "96", 4: "96"}
    assert _run(dict.fromkeys(keys, 2), keys, cap=4) == [[1, 2], [3, 4], [1, 2], [3, 4]]
