"""A plugin of pytest that writes each test's outcome at once: ``-p ...pytest_rows --rows FILE``.

The lines of the fixture ``report`` travel with the outcome of their test, also from other
processes of pytest-xdist.
"""

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MEASURED

LONGEST_REASON = 2000


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", help="File to which each outcome is appended, as a line of JSON.")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Rows(config), "rows")


class _Rows:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._path = Path(config.getoption("--rows"))
        self._seen = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        lines = item.config.stash[MEASURED]
        report.user_properties += [("measured", line) for line in lines[self._seen :]]
        self._seen = len(lines)
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if hasattr(self._config, "workerinput"):
            return
        if report.when != "call" and report.passed:
            return
        row: dict[str, Any] = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "took_s": report.duration,
            "measured": [value for name, value in report.user_properties if name == "measured"],
        }
        if not report.passed:
            row["reason"] = str(report.longrepr)[-LONGEST_REASON:]
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
