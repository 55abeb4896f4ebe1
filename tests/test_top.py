"""``diffusion-serve top``: its arithmetic, what it draws of two answers, and what becomes of it
with servers that are not as they should be."""

import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from itertools import pairwise
from pathlib import Path
from time import monotonic

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from serve_app.cli import cli
from serve_app.config import API_KEY_VARIABLE
from serve_app.errors import ConfigError
from serve_app.top import (
    WINDOW_S,
    Figures,
    History,
    Server,
    View,
    added,
    frame,
    histogram_quantile,
    increases,
    read,
)
from tests.e2e.conftest import free_port
from tests.waiting import wait_until

PROGRAM = Path(sys.executable).with_name("diffusion-serve")

BEFORE = """
# HELP diffusion_serve_replicas Replicas of the generator by their state.
# TYPE diffusion_serve_replicas gauge
diffusion_serve_replicas{model="demo",state="running"} 2.0
diffusion_serve_replicas{model="demo",state="starting"} 0.0
diffusion_serve_target_replicas{model="demo"} 3.0
diffusion_serve_gateway_info{model="demo",node="a",replica="gw",version="0.1.0"} 1.0
diffusion_serve_engine_info{device="cuda",gpu="GPU-1",model="demo",node="a",replica="r1",version="0.1.0"} 1.0
diffusion_serve_engine_info{device="cuda",gpu="GPU-2",model="demo",node="b",replica="r2",version="0.1.0"} 1.0
diffusion_serve_steps_total{model="demo",replica="r1",size="512"} 100.0
diffusion_serve_images_total{model="demo",replica="r1",size="512"} 4.0
diffusion_serve_device_seconds_total{activity="denoise",model="demo",replica="r1"} 50.0
diffusion_serve_batch_size_sum{model="demo",replica="r1"} 100.0
diffusion_serve_batch_size_count{model="demo",replica="r1"} 50.0
diffusion_serve_request_part_seconds_bucket{le="0.1",model="demo",part="queue",replica="gw"} 10.0
diffusion_serve_request_part_seconds_bucket{le="0.25",model="demo",part="queue",replica="gw"} 10.0
diffusion_serve_request_part_seconds_bucket{le="+Inf",model="demo",part="queue",replica="gw"} 10.0
diffusion_serve_deadlines_total{model="demo",outcome="met",replica="r1",set_by="server"} 4.0
"""  # noqa: E501

AFTER = """
diffusion_serve_replicas{model="demo",state="running"} 2.0
diffusion_serve_replicas{model="demo",state="starting"} 1.0
diffusion_serve_target_replicas{model="demo"} 3.0
diffusion_serve_scraped_replicas{answer="silent",deployment="Generator",model="demo"} 0.0
diffusion_serve_gateway_info{model="demo",node="a",replica="gw",version="0.1.0"} 1.0
diffusion_serve_engine_info{device="cuda",gpu="GPU-1",model="demo",node="a",replica="r1",version="0.1.0"} 1.0
diffusion_serve_engine_info{device="cuda",gpu="GPU-2",model="demo",node="b",replica="r2",version="0.1.0"} 1.0
diffusion_serve_arriving_work_ratio{model="demo",replica="r1"} 1.2
diffusion_serve_arriving_work_ratio{model="demo",replica="r2"} 0.3
diffusion_serve_requests_total{key="anonymous",model="demo",outcome="completed",priority="interactive",replica="gw"} 20.0
diffusion_serve_requests_total{key="anonymous",model="demo",outcome="invalid_value",priority="interactive",replica="gw"} 1.0
diffusion_serve_requests_total{key="other",model="demo",outcome="overloaded",priority="interactive",replica="gw"} 4.0
diffusion_serve_requests_total{key="other",model="demo",outcome="generation_failed",priority="interactive",replica="gw"} 1.0
diffusion_serve_requests_total{key="other",model="demo",outcome="unavailable",priority="interactive",replica="gw"} 0.0
diffusion_serve_requests_total{key="night",model="demo",outcome="overloaded",priority="batch",replica="gw"} 6.0
diffusion_serve_open_requests{model="demo",priority="interactive",replica="gw"} 17.0
diffusion_serve_open_requests{model="demo",priority="batch",replica="gw"} 2.0
diffusion_serve_steps_total{model="demo",replica="r1",size="512"} 150.0
diffusion_serve_steps_total{model="demo",replica="r1",size="1024"} 250.0
diffusion_serve_images_total{model="demo",replica="r1",size="512"} 14.0
diffusion_serve_images_total{model="demo",replica="r1",size="1024"} 10.0
diffusion_serve_device_seconds_total{activity="denoise",model="demo",replica="r1"} 58.5
diffusion_serve_device_seconds_total{activity="decode",model="demo",replica="r1"} 1.0
diffusion_serve_batch_size_sum{model="demo",replica="r1"} 400.0
diffusion_serve_batch_size_count{model="demo",replica="r1"} 150.0
diffusion_serve_engine_requests{model="demo",replica="r1",state="queued"} 3.0
diffusion_serve_engine_requests{model="demo",replica="r1",state="parked"} 12.0
diffusion_serve_engine_requests{model="demo",replica="r1",state="running"} 4.0
diffusion_serve_engine_requests{model="demo",replica="r2",state="queued"} 0.0
diffusion_serve_backlog_seconds{model="demo",priority="interactive",replica="r1"} 12.0
diffusion_serve_backlog_seconds{model="demo",priority="batch",replica="r1"} 888.0
diffusion_serve_backlog_seconds{model="demo",priority="interactive",replica="r2"} NaN
diffusion_serve_device_memory_bytes{kind="total",model="demo",replica="r1"} 85899345920
diffusion_serve_device_memory_bytes{kind="free",model="demo",replica="r1"} 64424509440
process_resident_memory_bytes{replica="r2"} 536870912
diffusion_serve_request_part_seconds_bucket{le="0.1",model="demo",part="queue",replica="gw"} 20.0
diffusion_serve_request_part_seconds_bucket{le="0.25",model="demo",part="queue",replica="gw"} 30.0
diffusion_serve_request_part_seconds_bucket{le="+Inf",model="demo",part="queue",replica="gw"} 30.0
diffusion_serve_deadlines_total{model="demo",outcome="met",replica="r1",set_by="server"} 22.0
diffusion_serve_deadlines_total{model="demo",outcome="missed",replica="r1",set_by="client"} 2.0
diffusion_serve_refusals_total{model="demo",reason="deadline",replica="r1"} 5.0
diffusion_serve_cancellation_seconds_count{model="demo",replica="r1"} 2.0
diffusion_serve_cancellation_seconds_bucket{le="0.01",model="demo",replica="r1"} 0.0
diffusion_serve_cancellation_seconds_bucket{le="0.03",model="demo",replica="r1"} 2.0
diffusion_serve_cancellation_seconds_bucket{le="+Inf",model="demo",replica="r1"} 2.0
diffusion_serve_cold_start_seconds{model="demo",phase="load",replica="r1"} 9.0
diffusion_serve_cold_start_seconds{model="demo",phase="certify",replica="r1"} 4.0
"""  # noqa: E501

FRAME = """\
demo at http://h:8000  0.1.0  12:00:00  last 10 s

Replicas   2 running, 1 starting; 3 wanted; cold start 13.0 s, most of it load
Arriving   work for 1.5 replicas, if no request shared a batch
Requests   2.0/s completed, 1.0/s overloaded, 0.10/s generation_failed, 0.10/s
           invalid_value; 19 open
Painted    2.0 pictures/s, 30.0 steps/s
Wait       in queue p50 0.10 s, p95 0.23 s; in all p50 -, p95 -
SLO        72% of 25 asked for, in time
Refused    0.50/s deadline
Cancelled  0.20/s, places free within 0.03 s (p95)

REPLICA    PAINTS   QUEUED PARKED RUNNING BATCH BACKLOG STEPS/S BUSY    MEMORY
r1         1024 512      3     12       4   3.0  15 min    30.0  95% 20/80 GiB
r2         idle          0      -       -     -       -       0   0%   0.5 GiB
1 starting
"""

SERVER = Server("http://h:8000")


def views(*answers: str, every_s: float = 10.0) -> View:
    history = History()
    seen = [history.add(index * every_s, read(text)) for index, text in enumerate(answers)]
    return seen[-1]


def drawn(
    view: View, width: int = 80, height: int | None = None, color: bool = False, notice: str = ""
) -> str:
    console = Console(
        file=StringIO(),
        width=width,
        markup=False,
        emoji=False,
        highlight=False,
        force_terminal=color,
        color_system="standard" if color else None,
        no_color=not color,
    )
    with console.capture() as capture:
        console.print(frame(SERVER, view, "12:00:00", console, height, notice))
    return re.sub(" +\n", "\n", capture.get())


# ---- arithmetic ----------------------------------------------------------------------------------

PROMETHEUS_SAYS = {
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
    """Values that ``promtool test rules`` gave for ``histogram_quantile`` of these buckets; none
    where it said NaN."""
    assert histogram_quantile(q, PROMETHEUS_SAYS[name]) == pytest.approx(value)


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


def steps(values: dict[str, float]) -> Figures:
    """Of replicas by name."""
    return Figures(
        {
            "diffusion_serve_steps_total": {
                frozenset({("replica", replica)}): value for replica, value in values.items()
            }
        }
    )


def rose(before: dict[str, float], now: dict[str, float]) -> dict[str, float]:
    return increases(steps(before), steps(now)).by("replica", "diffusion_serve_steps_total")


def test_what_rose() -> None:
    assert rose({"a": 5, "b": 2}, {"a": 9, "b": 2}) == {"a": 4, "b": 0}
    # Of one that is new, or was silent, nobody knows since when; one that is gone says nothing.
    assert rose({"a": 5}, {"a": 6, "new": 1000}) == {"a": 1}
    assert rose({"a": 5, "gone": 7}, {"a": 6}) == {"a": 1}


def test_a_process_that_began_anew_counts_from_0_in_all_its_series() -> None:
    text = (
        'diffusion_serve_target_replicas{{model="demo"}} 1\n'
        'diffusion_serve_steps_total{{replica="a",size="64"}} {}\n'
        'diffusion_serve_steps_total{{replica="a",size="128"}} {}\n'
        'diffusion_serve_backlog_seconds{{replica="a"}} {}\n'
    )
    before, now = read(text.format(100, 2, 50)), read(text.format(60, 3, 7))
    found = increases(before, now)
    assert found.by("size", "diffusion_serve_steps_total") == {"64": 60, "128": 3}
    assert found.total("diffusion_serve_backlog_seconds") is None  # a gauge


def test_a_new_series_of_a_known_replica_counts_from_0() -> None:
    view = views(BEFORE, AFTER)
    assert view.rose.by("size", "diffusion_serve_steps_total") == {"512": 50, "1024": 250}


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 50)), min_size=2))
def test_nothing_is_counted_twice_and_nothing_falls(done: list[dict[str, int]]) -> None:
    """Replicas come and go; what each did while it was heard at both ends is all there."""
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
def test_whatever_counters_do_nothing_is_negative(values: list[dict[str, int]]) -> None:
    for before, now in pairwise(values):
        assert all(value >= 0 for value in rose(dict(before), dict(now)).values())


@given(st.lists(st.floats(0.2, 30.0), min_size=1, max_size=60))
def test_rates_are_of_the_last_seconds(pauses: list[float]) -> None:
    """Of the fewest of the last pauses that make up the window, or of all."""
    history, at_s, count = History(), 0.0, 0.0
    history.add(at_s, steps({"a": count}))
    for pause in pauses:
        at_s, count = at_s + pause, count + 3 * pause
        view = history.add(at_s, steps({"a": count}))
    enough = [n for n in range(1, len(pauses) + 1) if sum(pauses[-n:]) >= WINDOW_S + 1e-6]
    longest = sum(pauses[-enough[0] :]) if enough else sum(pauses)
    assert min(sum(pauses), WINDOW_S) - 1e-6 <= view.seconds <= longest + 1e-6
    total = view.rose.total("diffusion_serve_steps_total")
    assert total is not None
    assert total / view.seconds == pytest.approx(3)


def test_after_a_gap_it_measures_anew() -> None:
    history = History()
    history.add(0, steps({"a": 1}))
    assert history.add(1, steps({"a": 2})).seconds == 1
    history.forget()
    assert history.add(60, steps({"a": 1000})).seconds == 0


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
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="/metrics"):
        read(text)


@given(st.text(), st.text(st.sampled_from('{}"\\=,# \n1a')))
def test_no_text_breaks_it(text: str, more: str) -> None:
    for garbage in (text, f"diffusion_serve_{text}", f"diffusion_serve_x{more}"):
        with pytest.raises(ConfigError):
            read(garbage)


# ---- frames --------------------------------------------------------------------------------------


def test_a_frame() -> None:
    assert drawn(views(BEFORE, AFTER)) == FRAME


def test_before_anything_can_be_compared() -> None:
    text = drawn(views(AFTER))
    assert "measuring" in text
    assert re.search(r"Painted +-\n", text)
    assert re.search(r"r1 +- +3 +12 +4 +- +15 min +- +- +20/80 GiB\n", text)


def test_a_wide_terminal_says_where_replicas_run() -> None:
    text = drawn(views(BEFORE, AFTER), width=120)
    assert re.search(r"MEMORY ON\n", text)
    assert "20/80 GiB a cuda GPU-1\n" in text
    assert max(map(len, text.splitlines())) <= 120


def test_without_a_replica() -> None:
    waiting = (
        'diffusion_serve_target_replicas{model="demo"} 0\n'
        'diffusion_serve_open_requests{model="demo",priority="interactive",replica="gw"} 3\n'
    )
    text = drawn(views(waiting, waiting))
    assert "0 running; 0 wanted" in text
    assert re.search(r"Requests +none; 3 open\n", text)
    assert text.rstrip().splitlines()[-1].startswith("REPLICA")


@pytest.mark.parametrize("height", [3, 14, 20, 40])
def test_a_low_terminal_counts_the_replicas_that_it_does_not_show(height: int) -> None:
    many = "".join(
        f'diffusion_serve_engine_info{{model="demo",replica="x{n:02}"}} 1\n' for n in range(20)
    )
    lines = drawn(views(BEFORE, AFTER + many), height=height).splitlines()
    head = next(index for index, line in enumerate(lines) if line.startswith("REPLICA"))
    rows = [line for line in lines[head + 1 :] if line.startswith(("r", "x"))]
    assert "1 starting" in lines
    assert len(lines) <= max(height, head + 3)
    more = [int(line.split()[0]) for line in lines if line.endswith(" more")]
    assert len(rows) + sum(more) == 22


def test_what_is_wrong_is_said() -> None:
    trouble = """
diffusion_serve_sharing{diffusion_serve_sharing="batched",replica="r1"} 0
diffusion_serve_sharing{diffusion_serve_sharing="interleaved",replica="r1"} 1
diffusion_serve_sharing{diffusion_serve_sharing="batched",replica="r2"} 1
diffusion_serve_out_of_memory_total{replica="r1"} 3
diffusion_serve_engine_stall_seconds_sum{replica="r1"} 1.5
diffusion_serve_held_requests{replica="gw"} 4
diffusion_serve_engine_requests{model="demo",replica="r2",state="parked"} 1.0
"""
    silent = AFTER.replace('deployment="Generator",model="demo"} 0', 'deployment="Generator"} 1')
    text = drawn(views(BEFORE, silent + trouble))
    assert "r1 does not batch: its requests are interleaved" in text
    assert "r2 does not batch" not in text
    assert "r2 has requests, and made no step in 10 s" in text
    assert re.search(r"^r2 +no step ", text, re.MULTILINE)
    assert "calls that ran out of device memory: 3" in text
    assert "engines stood still for 1.5 s between two calls" in text
    assert "4 held for a replica" in " ".join(text.split())
    assert "1 silent" in text.splitlines()
    assert "Trouble" not in drawn(views(BEFORE, AFTER))  # nor where nothing is said of sharing


def test_waits_beyond_the_last_bucket() -> None:
    buckets = "".join(
        f'diffusion_serve_request_seconds_bucket{{le="{le}",replica="gw"}} {count}\n'
        for le, count in (("120.0", 0), ("300.0", 0), ("+Inf", 5))
    )
    assert "in all p50 over 300 s" in drawn(views(BEFORE, AFTER + buckets))


def test_nothing_that_a_server_says_is_obeyed() -> None:
    """Neither by rich nor by the terminal."""
    evil = "[red]x[/red]:smile:\x1b]0;title\x07"
    view = views(*[f'diffusion_serve_target_replicas{{model="{evil}"}} 1\n'] * 2)
    text = drawn(view)
    assert "[red]x[/red]:smile:?]0;title? at" in text
    assert "\x1b" not in text


def test_colours_only_where_wanted() -> None:
    view = views(BEFORE, AFTER)
    assert "\x1b[33m1 starting" in drawn(view, color=True)
    assert "\x1b" not in drawn(view, notice="It is gone.")
    assert drawn(view, notice="It is gone.").startswith("It is gone.\n")


# ---- asking --------------------------------------------------------------------------------------


@dataclass
class Answers:
    """A server on a real port that says what it is told to."""

    url: str = ""
    status: int = 200
    text: str = AFTER
    key: str | None = None
    asked: list[str | None] = field(default_factory=list)
    """The ``Authorization`` of each request."""


@pytest.fixture
def answers() -> Iterator[Answers]:
    said = Answers()
    with _listening(said, 0) as server:
        said.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield said
        server.shutdown()


def _listening(said: Answers, port: int) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said.asked.append(self.headers["Authorization"])
            allowed = said.key is None or self.headers["Authorization"] == f"Bearer {said.key}"
            found = self.path == "/metrics"
            status = said.status if allowed and found else 401 if found else 404
            self.send_response(status)
            if status == 302:
                self.send_header("Location", f"{said.url}/metrics?again")
            self.end_headers()
            self.wfile.write(said.text.encode())

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


def top(*arguments: str, key: str | None = None) -> tuple[int, str, str]:
    result = CliRunner(env={API_KEY_VARIABLE: key}).invoke(
        cli, ["top", *arguments, "--once", "--every", "0.2"]
    )
    return result.exit_code, result.stdout, result.stderr


def test_once(answers: Answers) -> None:
    code, out, err = top(answers.url)
    assert (code, err) == (0, "")
    assert out.startswith(f"demo at {answers.url}  0.1.0")
    assert "1 starting" in out
    assert "\x1b" not in out
    assert len(answers.asked) == 2
    assert top(answers.url.removeprefix("http://"))[0] == 0
    assert top(f"{answers.url}/metrics")[0] == 0


def test_a_key_is_shown_to_the_server_and_to_nobody_else(answers: Answers) -> None:
    answers.key = "sk-secret"
    code, out, err = top(answers.url)
    assert (code, out) == (2, "")
    assert f"asks for an API key: give it in {API_KEY_VARIABLE}" in err
    for given_ in ({"key": "sk-wrong"}, {"key": "sk-wrong\n"}, {"key": "sk-wröng"}):
        code, out, err = top(answers.url, **given_)
        assert (code, out) == (2, "")
        assert "key" in err
        assert "wr" not in err
    assert top(answers.url, key="sk-secret")[0] == 0
    code, out, err = top(answers.url, "--key", "sk-secret", key="sk-wrong")
    assert code == 0
    assert "secret" not in out + err + repr(Server("http://h", "sk-secret"))


def test_a_key_follows_no_redirect(answers: Answers) -> None:
    answers.status = 302
    code, _, err = top(answers.url, key="sk-secret")
    assert code == 2
    assert "302" in err
    assert answers.asked == ["Bearer sk-secret"]


@pytest.mark.parametrize(
    ("status", "text", "words"),
    [
        (404, "", "has no /metrics"),
        (503, "", "answers GET /metrics with 503 Service Unavailable."),
        (200, "<html></html>", "no figures of diffusion-serve"),
        (200, "diffusion_serve_x{ 1", "not in Prometheus' format"),
    ],
)
def test_servers_that_are_none_of_ours(
    answers: Answers, status: int, text: str, words: str
) -> None:
    answers.status, answers.text = status, text
    code, out, err = top(answers.url)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("error: ") == 1


@pytest.mark.parametrize(
    "url",
    ["", "ftp://h", "http://", "http://user:secret@h", "http://h:port", "http://[", "http://h:99999",
     "http://h/?key=secret", "http://h/ x"],
)  # fmt: skip
def test_urls_that_are_none(url: str) -> None:
    code, _, err = top(url)
    assert code == 2
    assert "URL" in err
    assert "secret" not in err


def test_nobody_listens() -> None:
    code, _, err = top(f"http://127.0.0.1:{free_port()}")
    assert code == 2
    assert "does not answer: Connection refused." in err


def test_what_speaks_no_http() -> None:
    """Such as a server of SSH."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def speak() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"SSH-2.0-\x1b[31m\r\n")

        threading.Thread(target=speak, daemon=True).start()
        code, _, err = top(f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert code == 2
    assert "does not answer: SSH-2.0-?[31m" in err
    assert "\x1b" not in err


# ---- as a process --------------------------------------------------------------------------------


def test_it_goes_on_while_the_server_restarts(tmp_path: Path) -> None:
    """Frames below each other, for it writes to a file."""
    output = tmp_path / "frames.txt"
    server = _listening(Answers(), 0)
    port = server.server_address[1]
    with output.open("wb") as file:
        process = subprocess.Popen(
            [PROGRAM, "top", f"127.0.0.1:{port}", "--every", "0.2"], stdout=file, stderr=file
        )

    seen = 0

    def wait_for(words: str) -> None:
        nonlocal seen
        wait_until(lambda: words in output.read_text()[seen:], what=words)
        seen = output.read_text().index(words, seen)

    try:
        wait_for("last ")
        server.shutdown()
        server.server_close()
        wait_for("does not answer: Connection refused.")
        server = _listening(Answers(), port)
        wait_for("measuring")
        wait_for("last ")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        server.shutdown()
        server.server_close()
    text = output.read_text()
    assert "Asking on." in text
    assert "\x1b" not in text
    assert "Traceback" not in text


@pytest.mark.parametrize("told", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "kill"])
def test_it_leaves_a_terminal_as_it_was(told: signal.Signals, answers: Answers) -> None:
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [PROGRAM, "top", answers.url, "--every", "0.2"],
        stdin=its,
        stdout=its,
        stderr=its,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"},
    )
    os.close(its)
    seen = bytearray()

    def has(words: bytes) -> bool:
        if words not in seen and select.select([ours], [], [], 0)[0]:
            seen.extend(os.read(ours, 65536))  # raises where the process has ended without them
        return words in seen

    try:
        wait_until(lambda: has(b"last "), what="a frame with rates")
        assert b"\x1b[?1049h" in seen  # the other screen
        process.send_signal(told)
        wait_until(lambda: has(b"\x1b[?1049l"), what="the screen that was")
        wait_until(lambda: has(b"\x1b[?25h"), what="the cursor")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert b"Traceback" not in seen


def test_it_starts_without_what_serves_or_paints(report: Callable[[str], None]) -> None:
    code = "import serve_app.top, sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    started_at = monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    report(f"top is imported in {monotonic() - started_at:.2f} s, with Python's own start")
    assert not {"ray", "torch", "fastapi", "diffusers", "numpy"} & set(done.stdout.split())
