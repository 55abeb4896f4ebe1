"""The processes of a first day: one works, and this one starts it again if the GPU breaks it.

After an error of the device, such as an access to memory that is not there, every later call of
the same process fails. So the work has a process of its own, which ends after such an error. It is
also ended if a section does not end in time.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from tests.benchmarks.first_day.day import Day, NoAnswer, OutOfTime
from tests.benchmarks.first_day.results import FINAL, Results
from tests.benchmarks.first_day.sections import Section, sections
from tests.benchmarks.first_day.subject import Subjects

GRACE_S = 10.0
"""Time after the end of a call in which a section may still end by itself."""

LINE_END = "\n"

BROKEN = 75
"""Exit status of a process whose device can no longer be used."""


def supervise(output: Path, minutes: float, rehearse: bool) -> int:
    """Run all sections that have not been done, in other processes; return the exit status."""
    header = {
        "command": f"python -m tests.benchmarks.first_day --minutes {minutes:g}"
        + (" --rehearse" if rehearse else ""),
        "rehearsal": rehearse,
        "weights": "random",
    }
    Results(output, header).begin_call()
    until = time.time() + 60 * minutes
    command = [sys.executable, "-m", "tests.benchmarks.first_day", "--output", str(output)]
    command += ["--until", str(until), *(["--rehearse"] if rehearse else [])]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the process that works ends as well
    while True:
        status = _run_worker(command, until + GRACE_S)
        results = Results(output)
        running = results.running()
        if running is not None:
            reason = "did not end in time" if status is None else f"the process ended: {status}"
            results.mark(running, "stopped" if status is None else "failed", reason)
        if status is None or time.time() > until:
            break
        if running is None and status != BROKEN:
            break
    for section in sections():
        if results.state(section.name) is None:  # its process was ended before
            results.mark(section.name, "skipped", "no time was left")
    return _report(results)


def _run_worker(command: list[str], until: float) -> int | None:
    """Run a process, and return its exit status; None if it had to be ended."""
    worker = subprocess.Popen(command, start_new_session=True)  # with the processes it starts
    try:
        return worker.wait(timeout=max(1.0, until - time.time()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


def _report(results: Results) -> int:
    """Print the states and the targets; return 1 if a section failed."""
    print()
    states = results.values["sections"]
    for name, section in states.items():
        if section["state"] != "done":
            print(f"{section['state']}: {name}: {section['reason'].partition(LINE_END)[0]}")
    for row in results.values["rows"]:
        if "aim" in row and not results.values["rehearsal"]:
            met = "met" if row["met"] else "missed"
            print(f"{met}: {row['section']} | {row['row']}: {row['aim']}")
    print(f"{sum(one['state'] == 'done' for one in states.values())} sections done", flush=True)
    return int(any(section["state"] == "failed" for section in states.values()))


def work(output: Path, until: float, rehearse: bool) -> int:
    """Run the sections that have no state yet, until one breaks the device."""
    device = torch.device("cuda" if torch.cuda.is_available() and not rehearse else "cpu")
    results = Results(output)
    day = Day(results, device, rehearse, until)
    with tempfile.TemporaryDirectory() as folder:
        subjects = Subjects(day, Path(folder))
        for section in sections():
            if results.state(section.name) in FINAL:
                continue
            if not _run(day, section, subjects):
                return BROKEN
        subjects.release()
    return 0


def _run(day: Day, section: Section, subjects: Subjects) -> bool:
    """Run one section, and return False if the device can no longer be used."""
    estimate_s = section.rehearsed_s if day.rehearsal else section.estimate_s
    if estimate_s > day.left_s:
        reason = f"needs about {estimate_s:.0f} s, {max(0.0, day.left_s):.0f} s are left"
        day.results.mark(section.name, "skipped", reason)
        return True
    day.section = section.name
    day.results.mark(section.name, "running")
    started_at = time.perf_counter()
    try:
        section.run(day, subjects)
    except OutOfTime as stop:
        day.results.mark(section.name, "stopped", str(stop), time.perf_counter() - started_at)
    except Exception as error:  # noqa: BLE001 - a section may raise anything
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
        day.results.mark(section.name, "failed", reason, time.perf_counter() - started_at)
        if not _device_works(day, error):
            return False
        traceback.clear_frames(error.__traceback__)
        subjects.after_failure()
    else:
        day.results.mark(section.name, "done", took_s=time.perf_counter() - started_at)
    return True


def _device_works(day: Day, error: Exception) -> bool:
    """Return False after an error of the device, which may also have ended the engine's thread.

    A device that does not answer is never waited for again.
    """
    if isinstance(error, torch.AcceleratorError | NoAnswer):
        return False
    try:
        if day.device.type == "cuda":
            torch.cuda.synchronize()
    except torch.AcceleratorError:
        return False
    return True
