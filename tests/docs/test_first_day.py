"""The tables of the first day on a GPU, with a file and without one."""

import json
from pathlib import Path

import pytest

from tools.docs import first_day

STEPS = "sd15 at 512x512: steps"


def write(folder: Path, *rows: dict[str, object]) -> None:
    (folder / f"{first_day.NAME}.json").write_text(json.dumps({"rows": rows}))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(first_day, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("part", first_day.COLUMNS)
def test_without_a_file_nothing_is_measured(folder: Path, part: str) -> None:
    assert first_day.first_day_table(part) == first_day.NOT_YET


def test_a_table_has_the_rows_of_its_part_and_no_empty_column(folder: Path) -> None:
    write(
        folder,
        {"section": STEPS, "row": "batch 1", "step_ms": 14.25, "kernels": 1500, "control": 0},
        {"section": STEPS, "row": "batch 2", "out_of_memory": "CUDA out of memory"},
        {"section": "sd15 at 512x512: images", "row": "efficiency", "aim": "0.9", "met": False},
        {"section": "compile", "row": "start", "took_s": 61.24},
    )
    assert first_day.first_day_table("steps").splitlines() == [
        "|  | step | kernels | control |",
        "| --- | --- | --- | --- |",
        "| sd15 at 512x512, batch 1 | 14.2 ms | 1500 | 0 |",
        "| sd15 at 512x512, batch 2 |  |  |  |",
    ]
    assert "| sd15 at 512x512, efficiency | 0.9: missed |" in first_day.first_day_table("images")
    assert "| compile, start | 61.2 s |" in first_day.first_day_table("options")
    assert first_day.first_day_table("host") == first_day.NOT_YET


def test_an_unknown_part_is_an_error(folder: Path) -> None:
    with pytest.raises(KeyError):
        first_day.first_day_table("stepz")
