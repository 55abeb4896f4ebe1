"""Tables of the first day on a GPU, once its file is there."""

import json
from collections.abc import Sequence
from typing import Any

from tools.docs.markdown import table
from tools.docs.results import RESULTS

NAME = "first-day-h200"
"""Name of the file that ``tests.benchmarks.first_day`` writes on an H200."""

NOT_YET = "**Not yet measured.**"

Row = dict[str, Any]

Column = tuple[str, str, str]
"""Heading, key of the row, and format; the format "" shows the value as it is."""

COLUMNS: dict[str, tuple[Column, ...]] = {
    "ceilings": (
        ("time", "ms", ".2f ms"),
        ("arithmetic", "tflops", ".0f TFLOP/s"),
        ("bandwidth", "gb_per_s", ".0f GB/s"),
        ("host, each launch", "host_us_each", ".1f µs"),
    ),
    "start": (
        ("took", "took_s", ".1f s"),
        ("sharing", "sharing", ""),
        ("control", "control", ".1g"),
        ("relative L2", "relative_l2", ".1e"),
        ("worthwhile batch", "cap", ""),
        ("target", "aim", ""),
    ),
    "steps": (
        ("step", "step_ms", ".1f ms"),
        ("launch", "launch_ms", ".1f ms"),
        ("kernels", "kernels", ""),
        ("kernel time", "kernel_ms", ".1f ms"),
        ("arithmetic", "tflops", ".0f TFLOP/s"),
        ("of a matrix product", "share_of_matrix_product", ".0%"),
        ("gain", "gain_over_one", ".2f"),
        ("control", "control", ".1g"),
        ("relative L2", "relative_l2", ".1e"),
    ),
    "images": (
        ("images/s", "images_per_s", ".2f"),
        ("over stock", "over_stock", ".2f"),
        ("mean batch", "mean_batch", ".1f"),
        ("efficiency", "efficiency", ".2f"),
        ("engine, each request-step", "engine_ms_per_request_step", ".2f ms"),
        ("PSNR to alone", "psnr_db", ".1f dB"),
        ("target", "aim", ""),
    ),
    "host": (
        ("busy", "busy_share", ".0%"),
        ("gaps over 50 µs", "gaps_over_50_us", ""),
        ("waits a step", "waits_per_step", ".1f"),
    ),
    "options": (
        ("start", "took_s", ".1f s"),
        ("images/s", "images_per_s", ".2f"),
        ("times as fast", "times_as_fast", ".2f"),
        ("PSNR", "psnr_db", ".1f dB"),
    ),
    "tests/gpu": (("outcome", "outcome", ""), ("took", "took_s", ".1f s")),
}
"""Columns of each table. A column that no row has is left out."""

OPTIONS = ("compile", "CUDA graphs")


def first_day_table(part: str) -> str:
    """Render one part of the first day; say that it is not yet measured while there is no file.

    Raises:
        KeyError: no table has this name.
    """
    columns = COLUMNS[part]
    path = RESULTS / f"{NAME}.json"
    if not path.exists():
        return NOT_YET
    return rendered(_rows(json.loads(path.read_text())["rows"], part), columns)


def _rows(rows: Sequence[Row], part: str) -> list[Row]:
    return [row for row in rows if part in (row["section"], _part(row["section"]))]


def _part(section: str) -> str:
    return "options" if section in OPTIONS else section.rpartition(": ")[2]


def rendered(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Return the rows as a table, or that there are none."""
    shown = [column for column in columns if any(_has(row, column[1]) for row in rows)]
    if not shown:
        return NOT_YET
    lines = [[_name(row), *(_cell(row, key, form) for _, key, form in shown)] for row in rows]
    return table(["", *(heading for heading, _, _ in shown)], lines)


def _has(row: Row, key: str) -> bool:
    return row.get(key) is not None


def _name(row: Row) -> str:
    target = row["section"].rpartition(": ")[0] or row["section"]
    return f"{target}, {row['row']}"


def _cell(row: Row, key: str, form: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if key == "aim":
        return f"{value}: {'met' if row['met'] else 'missed'}"
    spec, _, unit = form.partition(" ")
    text = format(value, spec) if isinstance(value, int | float) else str(value)
    return f"{text} {unit}".strip()
