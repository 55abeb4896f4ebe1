from collections import Counter
from pathlib import Path

import pytest

from serve_app.errors import ConfigError
from serve_app.planner.trace import (
    MOST_ARRIVALS,
    Kind,
    drawn,
    parse_mix,
    poisson,
    read_arrivals,
)

SMALL, LARGE = Kind((512, 512), 20), Kind((1024, 768), 25)


def test_a_mix_is_parsed() -> None:
    assert parse_mix("512x512/20:1, 1024x768/25:3.5") == {SMALL: 1.0, LARGE: 3.5}


@pytest.mark.parametrize(
    "text",
    ["", "512x512", "512/20:1", "512x512/0:1", "0x512/20:1", "512x512/20:0", "512x512/20:-1"],
)
def test_a_wrong_mix_is_rejected(text: str) -> None:
    with pytest.raises(ConfigError, match="mix"):
        parse_mix(text)


def test_a_mix_drifts() -> None:
    at_s = [float(second) for second in range(4_000)]
    kinds = drawn(at_s, {SMALL: 9, LARGE: 1}, {SMALL: 1, LARGE: 9}, seed=1).kinds
    assert Counter(kinds[:1_000])[SMALL] == pytest.approx(800, abs=40)
    assert Counter(kinds[3_000:])[SMALL] == pytest.approx(200, abs=40)


def test_steady_arrivals() -> None:
    at_s = poisson(10.0, 100.0, seed=1)
    assert len(at_s) == pytest.approx(1_000, abs=100)
    assert list(at_s) == sorted(at_s)
    assert at_s[-1] < 100


def test_times_in_milliseconds_are_read_and_stretched(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text("500.0\n\n2000\n1000.0\n")
    assert read_arrivals(path, 2.0) == ([1.0, 2.0, 4.0], None)


def test_a_csv_may_name_the_kinds_of_requests(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("at_s,size,steps\n1.5,1024x768,25\n0.5,512x512,20\n")
    assert read_arrivals(path, 1.0) == ([0.5, 1.5], [SMALL, LARGE])


def test_counts_by_the_hour_are_spread_over_it(tmp_path: Path) -> None:
    """As in the public figures of Azure Functions: the first column has no name."""
    path = tmp_path / "trace.csv"
    path.write_text(",hour,invocations\n0,0,100000.5\n1,1,0\n2,2,300000.25\n")
    at_s, kinds = read_arrivals(path, 1.0, share=0.01, seed=1)
    assert kinds is None
    assert at_s == sorted(at_s)
    by_hour = Counter(int(at // 3_600) for at in at_s)
    assert by_hour[0] in (1_000, 1_001)
    assert by_hour[2] in (3_000, 3_001)
    assert by_hour.keys() == {0, 2}
    halves = Counter(at % 3_600 < 1_800 for at in at_s)
    assert halves[True] == pytest.approx(2_000, abs=160)
    half_s, _ = read_arrivals(path, 0.5, share=0.01, seed=1)
    assert half_s == [at / 2 for at in at_s]


def test_more_than_fit_into_memory_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(f"hour,invocations\n0,{MOST_ARRIVALS}\n1,{MOST_ARRIVALS}\n")
    with pytest.raises(ConfigError, match=r"40,000,000 arrivals; .* --share"):
        read_arrivals(path, 1.0)


def test_a_share_of_a_trace_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text("\n".join(str(number) for number in range(10_000)))
    at_s, _ = read_arrivals(path, 1.0, share=0.1, seed=1)
    assert len(at_s) == pytest.approx(1_000, abs=120)
    assert at_s[-1] > 9
    assert at_s != read_arrivals(path, 1.0, share=0.1, seed=2)[0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "no arrival"),
        ("soon\n", "line 1: 'soon' is no time"),
        ("1\n-5\n", "line 2"),
        ("1\nnan\n", "line 2"),
        ("at_s,size\n1,512x512\n", "no column steps"),
        ("at_s,size,steps\n1,512,20\n", "line 2: size must be"),
        ("at_s,size,steps\n1,512x512,0\n", "line 2"),
        ("at_s,size,steps\nx,512x512,5\n", "line 2: 'x' is no time"),
        ("day,invocations\n1,5\n", "no column hour"),
        ("hour,invocations\n0,5\n1,many\n", "line 3: 'many' is no count"),
        ("hour,invocations\nnoon,5\n", "line 2: 'noon' is no hour"),
    ],
)
def test_a_wrong_trace_names_its_line(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "trace"
    path.write_text(content)
    with pytest.raises(ConfigError, match=reason):
        read_arrivals(path, 1.0)


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_arrivals(tmp_path / "none", 1.0)
