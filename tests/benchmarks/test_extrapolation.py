"""The calculations of the benchmark of extrapolated calls."""

from pathlib import Path

import pytest
import torch

from tests.benchmarks.extrapolation import Measured, Way, draw, held_out, peers, row_of

NONE, FAST = (Way(level, level, None, 30) for level in ("none", "fast"))


def test_peers_make_as_many_calls_as_a_level() -> None:
    found = peers({FAST: Measured(calls=[13, 14, 16])})
    assert [way.steps for way in found] == [14, 14, 14]
    assert [way.noise_scheduler for way in found] == [None, "dpm++", "unipc"]
    assert {way.level for way in found} == {"none"}
    assert len({way.name for way in found}) == 3


def test_a_row_compares_images_and_turns_in_pairs(tmp_path: Path) -> None:
    pairs = held_out(3, seed=0)
    assert len({pair.prompt for pair in pairs}) == 3
    black = [torch.zeros(3, 64, 64)] * 3
    off = [torch.full((3, 64, 64), shade) for shade in (0.01, 0.1, 0.001)]
    none = Measured(black, [30, 30, 30], [1.0, 10.0, 2.0])
    fast = Measured(off, [10, 12, 14], [3.0, 20.0, 4.0])
    row = row_of(FAST, fast, none, off, pairs)
    assert (row["calls"], row["images_per_s"], row["speedup"]) == (12, 4.0, 2.0)
    assert row["psnr_to_none_db"] == pytest.approx(40.0, abs=1e-3)
    assert row["least_psnr_to_none_db"] == pytest.approx(20.0, abs=1e-3)
    assert row["psnr_to_truth_db"] == 200.0
    assert row["marks"]["shape"] == 0.0  # black squares show nothing
    rows = [row_of(NONE, none, none, off, pairs), row]
    rows += [{**row, "name": name, "noise_scheduler": name} for name in ("dpm++", "unipc")]
    rows.append({**row, "name": "own"})
    draw(rows, tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 1000
