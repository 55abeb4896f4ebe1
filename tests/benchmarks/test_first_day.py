"""The first day's rehearsal on the CPU, and its file, its resumption and its limits."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.first_day import run
from tests.benchmarks.first_day.carry import PACKAGES, commands, pinned
from tests.benchmarks.first_day.day import Day, NoAnswer, OutOfTime
from tests.benchmarks.first_day.host import gaps
from tests.benchmarks.first_day.kernels import busy_ms
from tests.benchmarks.first_day.results import Results
from tests.benchmarks.first_day.sections import Section, sections
from tests.benchmarks.first_day.subject import Subjects

ROOT = Path(__file__).parents[2]

HEADER = {"command": "test", "rehearsal": True, "weights": "random"}

LONGEST_COMMAND = 2000
"""Characters of a command that can be sent to a remote machine."""


def day(path: Path, seconds: float = 60.0) -> Day:
    return Day(Results(path, HEADER), torch.device("cpu"), True, time.time() + seconds)


def rows(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["section"], row["row"]): row for row in json.loads(path.read_text())["rows"]}


def states(path: Path) -> dict[str, str]:
    found = json.loads(path.read_text())["sections"]
    return {name: section["state"] for name, section in found.items()}


def test_each_row_is_on_disk_at_once_and_is_measured_once(tmp_path: Path) -> None:
    path = tmp_path / "day.json"
    one = day(path)
    one.section = "a"
    one.row("first", lambda: {"ms": 1.23456789, "none": float("nan")})
    assert rows(path)["a", "first"]["ms"] == 1.23457
    assert rows(path)["a", "first"]["none"] == "nan"
    again = day(path)
    again.section = "a"
    again.row("first", lambda: pytest.fail("measured twice"))
    with pytest.raises(OutOfTime, match="second needs about 90 s"):
        again.row("second", lambda: pytest.fail("does not fit"), estimate_s=90.0)


def test_a_rehearsal_is_not_mixed_with_a_real_run(tmp_path: Path) -> None:
    day(tmp_path / "day.json")
    with pytest.raises(SystemExit, match="has a rehearsal"):
        Results(tmp_path / "day.json", HEADER | {"rehearsal": False})


def test_a_section_that_fails_or_does_not_fit_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(day: Day, _: Subjects) -> None:
        day.row("known before", lambda: {"ms": 1.0})
        raise RuntimeError("no such kernel")

    def stops(day: Day, _: Subjects) -> None:
        day.row("long", lambda: {"ms": 1.0}, estimate_s=1e6)

    def works(day: Day, _: Subjects) -> None:
        day.row("quick", lambda: {"ms": 1.0})

    listed = [
        Section("fails", fails, 1.0),
        Section("is too long", works, 1.0, rehearsed_s=1e6),
        Section("stops", stops, 1.0),
        Section("works", works, 1.0),
    ]
    monkeypatch.setattr(run, "sections", lambda: listed)
    path = tmp_path / "day.json"
    until = day(path).until
    assert run.work(path, until, rehearse=True) == 0
    expected = {
        "fails": "failed",
        "is too long": "skipped",
        "stops": "stopped",
        "works": "done",
    }
    assert states(path) == expected
    assert ("fails", "known before") in rows(path)
    assert "no such kernel" in capsys.readouterr().err
    # Another call: what is done stays, the others begin again.
    results = Results(path)
    results.begin_call()
    assert states(path) == {"works": "done"}
    assert ("fails", "known before") in rows(path)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("an illegal memory access was encountered"),
        NoAnswer("no image for 120 s"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_broken_device_ends_the_process_and_not_the_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def breaks(day: Day, _: Subjects) -> None:
        raise error

    def works(day: Day, _: Subjects) -> None:
        day.row("quick", lambda: {"ms": 1.0})

    listed = [Section("breaks", breaks, 1.0), Section("works", works, 1.0)]
    monkeypatch.setattr(run, "sections", lambda: listed)
    path = tmp_path / "day.json"
    until = day(path).until
    assert run.work(path, until, rehearse=True) == run.BROKEN
    assert states(path) == {"breaks": "failed"}
    assert run.work(path, until, rehearse=True) == 0
    assert states(path) == {"breaks": "failed", "works": "done"}


def test_a_process_that_dies_costs_one_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def works(day: Day, _: Subjects) -> None:
        day.row("quick", lambda: {"ms": 1.0})

    path = tmp_path / "day.json"
    calls: list[float] = []

    def run_worker(command: list[str], until: float) -> int:
        calls.append(until)
        if len(calls) == 1:
            Results(path).mark("dies", "running")
            return -9
        return run.work(path, until, rehearse=True)

    monkeypatch.setattr(run, "sections", lambda: [Section(n, works, 1.0) for n in ("dies", "b")])
    monkeypatch.setattr(run, "_run_worker", run_worker)
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    assert run.supervise(path, minutes=1.0, rehearse=True) == 1
    assert len(calls) == 2
    assert states(path) == {"dies": "failed", "b": "done"}
    assert "the process ended: -9" in path.read_text()
    # Called again, only what failed runs.
    assert run.supervise(path, minutes=1.0, rehearse=True) == 0
    assert states(path) == {"b": "done", "dies": "done"}


def test_sections_that_were_not_reached_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_worker(command: list[str], until: float) -> None:
        Results(path).mark("hangs", "running")

    path = tmp_path / "day.json"
    listed = [Section(name, lambda day, subjects: None, 1.0) for name in ("hangs", "later")]
    monkeypatch.setattr(run, "sections", lambda: listed)
    monkeypatch.setattr(run, "_run_worker", run_worker)
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    assert run.supervise(path, minutes=1.0, rehearse=True) == 0
    assert states(path) == {"hangs": "stopped", "later": "skipped"}


def test_section_names_are_unique() -> None:
    names = [section.name for section in sections()]
    assert len(names) == len(set(names))
    assert names[0] == "environment"
    assert names[-1] == "tests/gpu"


def test_busy_times_and_gaps_of_overlapping_kernels() -> None:
    spans = [(0.0, 2.0, "a"), (1.0, 3.0, "b"), (5.0, 6.0, "a"), (5.5, 5.6, "c"), (7.0, 8.0, "a")]
    assert busy_ms(spans) == pytest.approx(5.0)
    assert gaps(spans) == [2.0, 1.0]


def test_the_carried_packages_are_pinned_and_the_command_is_short() -> None:
    for package in PACKAGES:
        assert pinned(package).lower().startswith(f"{package.lower()}==")
    command = commands(Path(".whl"), Path("build/first-day.json"), 9.0)
    assert len(command) < LONGEST_COMMAND
    assert "--minutes 9 --output build/first-day.json" in command
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {".whl/", "build/"} <= set(ignored)


@pytest.mark.slow
def test_a_rehearsal_measures_every_section_that_fits(tmp_path: Path) -> None:
    """It also shows that the engine needs neither Ray nor an installed project."""
    path = tmp_path / "day.json"
    command = [sys.executable, "-m", "tests.benchmarks.first_day", "--rehearse", "--minutes", "0.6"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--output", str(path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = states(path)
    assert found.keys() == {section.name for section in sections()}
    assert set(found.values()) <= {"done", "skipped", "stopped"}
    for section in ("environment", "ceilings", "sd15 at 512x512: start", "sd15 at 512x512: steps"):
        assert found[section] == "done"
    known = rows(path)
    for (section, _), row in known.items():
        if ":" in section and "not measured" not in row and not section.endswith("host"):
            assert row["weights"] == "random"
    for batch in (1, 2):
        step = known["sd15 at 512x512: steps", f"batch {batch}"]
        assert step["control"] == 0
        assert step["relative_l2"] < 1e-5
    shown = [line for line in done.stdout.splitlines() if " | " in line]
    assert len(shown) == len(known)
