import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.top.snapshot import WINDOW_S, History
from tests.top.scrapes import steps


@given(st.lists(st.floats(0.2, 30.0), min_size=1, max_size=60))
def test_rates_cover_the_last_seconds(pauses: list[float]) -> None:
    """The span is that of the fewest last pauses that fill the window, or of all pauses."""
    history, at_s, count = History(), 0.0, 0.0
    history.add(at_s, steps({"a": count}))
    for pause in pauses:
        at_s, count = at_s + pause, count + 3 * pause
        snapshot = history.add(at_s, steps({"a": count}))
    enough = [n for n in range(1, len(pauses) + 1) if sum(pauses[-n:]) >= WINDOW_S + 1e-6]
    longest = sum(pauses[-enough[0] :]) if enough else sum(pauses)
    assert min(sum(pauses), WINDOW_S) - 1e-6 <= snapshot.seconds <= longest + 1e-6
    total = snapshot.rose.total("diffusion_serve_steps_total")
    assert total is not None
    assert total / snapshot.seconds == pytest.approx(3)


def test_rates_start_again_after_a_gap() -> None:
    history = History()
    history.add(0, steps({"a": 1}))
    assert history.add(1, steps({"a": 2})).seconds == 1
    history.clear()
    assert history.add(60, steps({"a": 1000})).seconds == 0
