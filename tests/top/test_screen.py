import re
from io import StringIO

import pytest
from rich.console import Console

from serve_app.top import Server
from serve_app.top.screen import frame
from serve_app.top.snapshot import Snapshot
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
diffusion_serve_requests_waiting_for_replica{replica="gw"} 4
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
    assert "4 waiting for a replica" in " ".join(text.split())
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
