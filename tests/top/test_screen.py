import re
from io import StringIO

import pytest
from rich.console import Console

from serve_app.errors import ConfigError
from serve_app.top import Server
from serve_app.top.screen import frame
from serve_app.top.series import parse
from serve_app.top.snapshot import History, Snapshot
from tests.top.scrapes import AFTER, BEFORE, snapshots

FRAME = """\
demo at http://h:8000  0.1.0  12:00:00  last 10 s

Replicas   2 running, 1 starting; target 3; cold start 13.0 s, most of it load
Arriving   work for 1.5 replicas without batching
Requests   2.0/s completed, 1.0/s overloaded, 0.10/s generation_failed, 0.10/s
           invalid_value; 19 open
Generated  2.0 images/s, 30.0 steps/s
Wait       queue p50 0.10 s, p95 0.23 s; total p50 -, p95 -
SLO        72% of 25 attempts in time
Rejected   0.50/s deadline
Cancelled  0.20/s, slots free within 0.03 s (p95)

REPLICA    SIZES    QUEUED PARKED RUNNING BATCH BACKLOG STEPS/S BUSY    MEMORY
r1         1024 512      3     12       4   3.0  15 min    30.0  95% 20/80 GiB
r2         idle          0      -       -     -       -       0   0%   0.5 GiB
1 starting
"""

SERVER = Server("http://h:8000")


def render(
    snapshot: Snapshot,
    width: int = 80,
    height: int | None = None,
    color: bool = False,
    notice: str = "",
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
        console.print(frame(SERVER, snapshot, "12:00:00", console, height, notice))
    return re.sub(" +\n", "\n", capture.get())


def test_a_frame() -> None:
    assert render(snapshots(BEFORE, AFTER)) == FRAME


def test_the_first_frame_has_no_rates() -> None:
    text = render(snapshots(AFTER))
    assert "measuring" in text
    assert re.search(r"Generated +-\n", text)
    assert re.search(r"r1 +- +3 +12 +4 +- +15 min +- +- +20/80 GiB\n", text)


def test_a_wide_terminal_displays_the_nodes() -> None:
    text = render(snapshots(BEFORE, AFTER), width=120)
    assert re.search(r"MEMORY NODE\n", text)
    assert "20/80 GiB a cuda GPU-1\n" in text
    assert max(map(len, text.splitlines())) <= 120


QUICK = """
diffusion_serve_target_replicas{model="quick"} 2.0
diffusion_serve_replicas{model="quick",state="running"} 1.0
diffusion_serve_replicas{model="quick",state="starting"} 1.0
diffusion_serve_scraped_replicas{answer="silent",deployment="Generator-quick",model="quick"} 1.0
diffusion_serve_engine_info{device="cpu",gpu="",model="quick",node="c",replica="q1",version="0.1.0"} 1.0
diffusion_serve_requests_waiting_for_replica{model="quick",replica="gw"} 4
diffusion_serve_cold_start_seconds{model="quick",phase="certify",replica="q1"} 20.0
"""  # noqa: E501


def test_several_models_are_told_apart() -> None:
    snapshot = snapshots(BEFORE + QUICK, AFTER + QUICK)
    text = " ".join(render(snapshot, width=120).split())
    assert text.startswith("demo, quick at ")
    assert "demo: 2 running, 1 starting; target 3; cold start 13.0 s, most of it load" in text
    waiting = "target 2; 4 requests wait for a replica to start; cold start 20.0 s"
    assert f"quick: 1 running, 1 starting; {waiting}, most of it certify" in text
    assert re.search(r"MEMORY MODEL NODE r1 .* demo a cuda GPU-1 r2 .* demo b .* quick c cpu", text)
    assert text.endswith("1 starting of demo 1 starting of quick 1 silent")
    assert max(map(len, render(snapshot).splitlines())) <= 80


def test_one_of_several_models_looks_as_if_it_were_alone() -> None:
    """Of the gateways' series, which have all models, only its own are counted."""
    history = History()
    for at_s, text in ((0.0, BEFORE), (10.0, AFTER)):
        snapshot = history.add(at_s, parse(text + QUICK).of_model("demo"))
    assert render(snapshot) == FRAME
    with pytest.raises(ConfigError, match="no model 'x': it has 'demo', 'quick'"):
        parse(AFTER + QUICK).of_model("x")


def test_without_a_replica() -> None:
    waiting = (
        'diffusion_serve_target_replicas{model="demo"} 0\n'
        'diffusion_serve_open_requests{model="demo",priority="interactive",replica="gw"} 3\n'
    )
    text = render(snapshots(waiting, waiting))
    assert "0 running; target 0" in text
    assert re.search(r"Requests +none; 3 open\n", text)
    assert text.rstrip().splitlines()[-1].startswith("REPLICA")


@pytest.mark.parametrize("height", [3, 14, 20, 40])
def test_a_low_terminal_counts_the_hidden_replicas(height: int) -> None:
    many = "".join(
        f'diffusion_serve_engine_info{{model="demo",replica="x{n:02}"}} 1\n' for n in range(20)
    )
    lines = render(snapshots(BEFORE, AFTER + many), height=height).splitlines()
    head = next(index for index, line in enumerate(lines) if line.startswith("REPLICA"))
    rows = [line for line in lines[head + 1 :] if line.startswith(("r", "x"))]
    assert "1 starting" in lines
    assert len(lines) <= max(height, head + 3)
    more = [int(line.split()[0]) for line in lines if line.endswith(" more")]
    assert len(rows) + sum(more) == 22


def test_problems_are_displayed() -> None:
    problem = """
diffusion_serve_sharing{diffusion_serve_sharing="batched",replica="r1"} 0
diffusion_serve_sharing{diffusion_serve_sharing="interleaved",replica="r1"} 1
diffusion_serve_sharing{diffusion_serve_sharing="batched",replica="r2"} 1
diffusion_serve_out_of_memory_total{replica="r1"} 3
diffusion_serve_engine_stall_seconds_sum{replica="r1"} 1.5
diffusion_serve_requests_waiting_for_replica{model="demo",replica="gw"} 4
diffusion_serve_engine_requests{model="demo",replica="r2",state="parked"} 1.0
"""
    silent = AFTER.replace('deployment="Generator",model="demo"} 0', 'deployment="Generator"} 1')
    text = render(snapshots(BEFORE, silent + problem))
    assert "r1 does not batch: its requests are interleaved" in text
    assert "r2 does not batch" not in text
    assert "r2 has requests and made no denoiser call for 10 s" in text
    assert re.search(r"^r2 +no step ", text, re.MULTILINE)
    assert "network calls that ran out of device memory: 3" in text
    assert "engines had requests and made no network call for 1.5 s" in text
    assert "4 requests wait for a replica to start" in " ".join(text.split())
    assert "1 silent" in text.splitlines()
    assert "Problem" not in render(snapshots(BEFORE, AFTER))  # nor without the sharing metric


def test_waits_beyond_the_last_bucket() -> None:
    buckets = "".join(
        f'diffusion_serve_request_seconds_bucket{{le="{le}",replica="gw"}} {count}\n'
        for le, count in (("120.0", 0), ("300.0", 0), ("+Inf", 5))
    )
    assert "total p50 over 300 s" in render(snapshots(BEFORE, AFTER + buckets))


def test_markup_and_control_characters_are_not_interpreted() -> None:
    """Neither rich nor the terminal interprets them."""
    evil = "[red]x[/red]:smile:\x1b]0;title\x07"
    snapshot = snapshots(*[f'diffusion_serve_target_replicas{{model="{evil}"}} 1\n'] * 2)
    text = render(snapshot)
    assert "[red]x[/red]:smile:?]0;title? at" in text
    assert "\x1b" not in text


def test_colours_need_a_terminal_with_colours() -> None:
    snapshot = snapshots(BEFORE, AFTER)
    assert "\x1b[33m1 starting" in render(snapshot, color=True)
    assert "\x1b" not in render(snapshot, notice="It is gone.")
    assert render(snapshot, notice="It is gone.").startswith("It is gone.\n")
