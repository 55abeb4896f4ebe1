"""Section "tests/gpu": the tests that need a GPU, each with its outcome."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.first_day.day import Day, OutOfTime

ROOT = Path(__file__).parents[3]

PROCESSES = 8
"""Processes for tests of tiny models, which a single one runs no faster than its host."""

MARGIN_S = 5.0
"""Time to end pytest before the time of the call ends."""


def gpu_tests(day: Day) -> None:
    """Write the outcome of each test.

    Raises:
        OutOfTime: not all tests have run.
        RuntimeError: pytest did not run, or tests failed.
    """
    _run(day, "tests/gpu/test_certification.py", "--numprocesses", str(min(PROCESSES, _cores())))
    # One process: a test fills the device's memory.
    _run(day, "tests/gpu", "--ignore", "tests/gpu/test_certification.py")
    rows = [row for row in day.results.values["rows"] if row["section"] == day.section]
    if failed := [row["row"] for row in rows if row["outcome"] == "failed"]:
        raise RuntimeError(f"{len(failed)} tests failed, first {failed[0]}")


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _run(day: Day, *arguments: str) -> None:
    known = [
        row["row"]
        for row in day.results.values["rows"]
        if row["section"] == day.section and row["outcome"] == "passed"
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        path.touch()
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "pytest", *arguments, "-m", "gpu", "--rows", str(path)]
        command += ["-p", "tests.benchmarks.first_day.pytest_rows", "-p", "no:cacheprovider"]
        command += ["-W", "default"]  # other versions of torch warn of other things
        command += [part for test in known for part in ("--deselect", test)]
        with log.open("w") as output:
            pytest = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
            try:
                written, skipped = 0, []
                while True:
                    status = _wait(pytest)
                    for row in _new_rows(path, written):
                        written += 1
                        if row["outcome"] == "skipped":
                            skipped.append(row["reason"])
                        else:
                            day.results.add(day.section, row.pop("test"), row)
                    if status is not None:
                        break
                    if day.left_s < MARGIN_S:
                        raise OutOfTime(f"{written} tests ended")
            finally:
                pytest.kill()  # the processes of pytest-xdist end with it
                pytest.wait()
        if skipped:
            values = {"outcome": "skipped", "tests": len(skipped), "reason": skipped[0]}
            day.results.add(day.section, f"skipped of {arguments[0]}", values)
        if status not in (0, 1, 5):  # passed, some failed, none left
            raise RuntimeError(f"pytest ended with status {status}: {log.read_text()[-2000:]}")


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return None


def _new_rows(path: Path, known: int) -> Iterator[dict[str, Any]]:
    lines = path.read_text().split("\n")
    for line in lines[known:-1]:  # the last one may be half written
        yield json.loads(line)
