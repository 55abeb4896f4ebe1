from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import ConfigError
from serve_app.top.series import added, histogram_quantile, increases, parse
from tests.top.scrapes import AFTER, BEFORE, snapshots, steps

BUCKETS = {
    "2 5 5 10": ((0.1, 2), (0.5, 5), (1, 5), (float("inf"), 10)),
    "0 0 4 8 8": ((0.1, 0), (0.5, 0), (1, 4), (2, 8), (float("inf"), 8)),
    "negative": ((-1, 3), (1, 6), (float("inf"), 6)),
    "not cumulative": ((1, 3), (0.5, 3.5), (2, 4), (float("inf"), 4)),
    "empty": ((1, 0), (float("inf"), 0)),
    "no infinity": ((1, 7), (2, 7)),
}


@pytest.mark.parametrize(
    ("name", "q", "value"),
    [
        ("2 5 5 10", 0.0, 0.0),
        ("2 5 5 10", 0.25, 1 / 6),
        ("2 5 5 10", 0.5, 0.5),
        ("2 5 5 10", 0.95, 1.0),
        ("0 0 4 8 8", 0.0, None),
        ("0 0 4 8 8", 0.25, 0.75),
        ("0 0 4 8 8", 0.5, 1.0),
        ("0 0 4 8 8", 0.95, 1.9),
        ("0 0 4 8 8", 1.0, 2.0),
        ("negative", 0.25, -1.0),
        ("negative", 0.9, 0.6),
        ("not cumulative", 0.25, 1 / 7),
        ("not cumulative", 0.9, 1.2),
        ("empty", 0.5, None),
        ("no infinity", 0.5, None),
    ],
)
def test_quantiles_are_those_of_prometheus(name: str, q: float, value: float | None) -> None:
    """The values are those of ``promtool test rules`` for ``histogram_quantile``; None for NaN."""
    assert histogram_quantile(q, BUCKETS[name]) == pytest.approx(value)


BOUNDS = (0.1, 0.5, 1.0, 4.0, 60.0)


@given(
    st.lists(st.floats(0.001, 60.0), min_size=1),
    st.floats(0.01, 1.0),
    st.permutations([*BOUNDS, float("inf")]),
)
def test_a_quantile_is_in_the_bucket_of_the_true_one(
    waits: list[float], q: float, order: list[float]
) -> None:
    found = histogram_quantile(q, ((le, sum(wait <= le for wait in waits)) for le in order))
    rank = next(n for n in range(1, len(waits) + 1) if n >= q * len(waits))
    true = sorted(waits)[rank - 1]
    above = next(le for le in BOUNDS if true <= le)
    below = max((le for le in BOUNDS if le < true), default=0.0)
    assert found is not None
    assert below - 1e-9 <= found <= above + 1e-9  # arithmetic of floats


def rose(before: dict[str, float], now: dict[str, float]) -> dict[str, float]:
    return increases(steps(before), steps(now)).by("replica", "diffusion_serve_steps_total")


def test_increases() -> None:
    assert rose({"a": 5, "b": 2}, {"a": 9, "b": 2}) == {"a": 4, "b": 0}
    # The increase of a new or silent replica is unknown; a stopped one has none.
    assert rose({"a": 5}, {"a": 6, "new": 1000}) == {"a": 1}
    assert rose({"a": 5, "gone": 7}, {"a": 6}) == {"a": 1}


def test_all_series_of_a_restarted_process_count_from_0() -> None:
    text = (
        'diffusion_serve_target_replicas{{model="demo"}} 1\n'
        'diffusion_serve_steps_total{{replica="a",size="64"}} {}\n'
        'diffusion_serve_steps_total{{replica="a",size="128"}} {}\n'
        'diffusion_serve_backlog_seconds{{replica="a"}} {}\n'
    )
    before, now = parse(text.format(100, 2, 50)), parse(text.format(60, 3, 7))
    found = increases(before, now)
    assert found.by("size", "diffusion_serve_steps_total") == {"64": 60, "128": 3}
    assert found.total("diffusion_serve_backlog_seconds") is None  # a gauge


def test_a_new_series_of_a_known_replica_counts_from_0() -> None:
    snapshot = snapshots(BEFORE, AFTER)
    assert snapshot.rose.by("size", "diffusion_serve_steps_total") == {"512": 50, "1024": 250}


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 50)), min_size=2))
def test_nothing_is_counted_twice_and_nothing_falls(done: list[dict[str, int]]) -> None:
    """Replicas come and go. The sum has all increases between two scrapes with the replica."""
    counters: dict[str, int] = {}
    answers, expected = [], dict.fromkeys("abc", 0)
    for before, now in zip([{}, *done], done, strict=False):
        for replica, more in now.items():
            counters[replica] = counters.get(replica, 0) + more
            if replica in before:
                expected[replica] += more
        answers.append(steps({replica: counters[replica] for replica in now}))
    found = added(increases(before, now) for before, now in pairwise(answers))
    sums = found.by("replica", "diffusion_serve_steps_total")
    assert {replica: sums.get(replica, 0) for replica in "abc"} == expected


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 50)), min_size=2))
def test_no_increase_is_negative(values: list[dict[str, int]]) -> None:
    for before, now in pairwise(values):
        assert all(value >= 0 for value in rose(dict(before), dict(now)).values())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<html>It works!</html>",
        "python_info 1\n",
        "diffusion_serve_target_replicas",
        'diffusion_serve_target_replicas{model="demo} 1',
        "diffusion_serve_target_replicas{model=demo} 1",
        "diffusion_serve_target_replicas many",
        'diffusion_serve_request_seconds_bucket{le="x"} 1',
    ],
)
def test_other_texts_are_rejected(text: str) -> None:
    with pytest.raises(ConfigError, match="/metrics"):
        parse(text)


@given(st.text(), st.text(st.sampled_from('{}"\\=,# \n1a')))
def test_any_other_text_is_a_config_error(text: str, more: str) -> None:
    for garbage in (text, f"diffusion_serve_{text}", f"diffusion_serve_x{more}"):
        with pytest.raises(ConfigError):
            parse(garbage)
