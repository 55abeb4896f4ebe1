"""The thresholds of a model's acceleration: what they cost, and which ones are chosen."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from serve_app.cli.main import cli
from serve_app.tuning import caches, front
from serve_app.tuning.distances import ssim
from serve_app.tuning.front import Row, largest
from tests.conftest import DEMO
from tests.tiny_pipelines import CALL_KWARGS, FAMILIES, HEIGHT_PX, WIDTH_PX


def row(threshold: float, median_db: float, least_db: float = 100.0) -> Row:
    return Row("extrapolated", threshold, 10.0, median_db, least_db, 1.0, 40.0)


@pytest.mark.parametrize(
    ("rows", "threshold"),
    [
        ([row(0.01, 60.0), row(0.02, 50.0), row(0.04, 44.0)], 0.02),
        ([row(0.01, 60.0), row(0.02, 44.0), row(0.04, 50.0)], 0.01),  # by chance
        ([row(0.01, 60.0), row(0.02, 50.0, 34.9)], 0.01),  # one image is far off
        ([row(0.01, 60.0), row(0.02, 50.0, 35.0)], 0.02),
        ([row(0.01, 44.0)], None),
    ],
)
def test_the_largest_threshold_up_to_which_all_are_close(
    rows: list[Row], threshold: float | None
) -> None:
    found = largest(rows, 45.0)
    assert (found and found.threshold) == threshold


def test_similarity_falls_with_noise_and_ignores_little_of_brightness() -> None:
    image = torch.linspace(0, 1, 32).repeat(3, 32, 1)
    noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert ssim(image, image) == pytest.approx(1.0)
    noisy = [ssim(image, (image + scale * noise).clamp(0, 1)) for scale in (0.01, 0.05, 0.2)]
    assert noisy == sorted(noisy, reverse=True)
    assert noisy[2] < 0.4 < 0.9 < noisy[0]
    assert ssim(image, (image + 0.05).clamp(0, 1)) > 0.95
    assert ssim(image[:, :3, :3], image[:, :3, :3]) == pytest.approx(1.0)  # less than a window


def config(folder: Path, **model: object) -> str:
    """Write a config of the shipped model, changed by ``model``."""
    args = {"model": DEMO.model_dump(exclude_unset=True) | model}
    path = folder / "config.yaml"
    application = {"import_path": "serve_app.app:build", "args": args}
    path.write_text(yaml.safe_dump({"applications": [application]}))
    return str(path)


@pytest.mark.usefixtures("reused_starts")
def test_thresholds_are_measured_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "GRID", (0.01, 1.0))
    monkeypatch.setattr(front, "PEERS", ("dpm++",))
    prompts, output = tmp_path / "prompts.txt", tmp_path / "front.json"
    prompts.write_text("a red circle\n\na green star on white\na blue ring\na pink cross\n")
    arguments = ["--config", config(tmp_path), "--prompts", str(prompts), "--steps", "8"]
    arguments += ["--truth-steps", "9", "--balanced-db", "60", "--fast-db", "8"]
    result = CliRunner().invoke(cli, ["tune", *arguments, "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "4 images in 8 steps; the truth has 9." in result.output
    assert "balanced_error: 0.01\n    fast_error: 1\n" in result.output
    for name in ("FirstBlockCache", "TaylorSeer"):
        assert f"{name} is left out: StableDiffusionPipeline does not support it." in result.output
    found = json.loads(output.read_text())
    assert (found["balanced_error"], found["fast_error"]) == (0.01, 1.0)
    none, low, high, *peers = found["rows"]
    assert (none["calls"], none["to_none_db"], none["to_none_ssim"]) == (8, 200, 1)
    assert 8 >= low["calls"] > high["calls"] >= 5
    assert low["to_none_db"] > high["to_none_db"] > 8
    for chosen in (low, high):
        steps = round(chosen["calls"])
        ways = {peer["way"]: peer["calls"] for peer in peers}
        assert ways[f"{steps} steps, own scheduler"] == ways[f"{steps} steps, dpm++"] == steps


def test_caches_stand_beside_extrapolation_where_the_denoiser_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "GRID", (1.0,))
    monkeypatch.setattr(front, "PEERS", ())
    monkeypatch.setattr(caches, "FIRST_BLOCK_THRESHOLDS", (0.0, 100.0))
    monkeypatch.setattr(caches, "TAYLOR_INTERVALS", (4,))
    FAMILIES["flux"]().save_pretrained(tmp_path / "flux")
    size = [WIDTH_PX, HEIGHT_PX]
    model = {"id": "tiny", "path": str(tmp_path / "flux"), "default_size_px": size}
    path = config(tmp_path, **model, default_steps=8, call_kwargs=CALL_KWARGS["flux"])
    prompts, output = tmp_path / "prompts.txt", tmp_path / "front.json"
    prompts.write_text("a\nb\nc\nd\n")
    arguments = ["tune", "--config", path, "--prompts", str(prompts), "--truth-steps", "9"]
    result = CliRunner().invoke(cli, [*arguments, "--output", str(output)])
    assert result.exit_code == 0, result.output
    found = {row["way"]: row for row in json.loads(output.read_text())["rows"]}
    exact, most = found["FirstBlockCache, 0"], found["FirstBlockCache, 100"]
    assert (exact["calls"], most["calls"], found["TaylorSeer, 4"]["calls"]) == (8, 1, 4)
    assert exact["least_to_none_db"] > 80 > most["to_none_db"]


@pytest.mark.parametrize(
    ("model", "lines", "reason"),
    [
        ({"id": "mine", "path": "/no/such"}, None, "--prompts: give a file with prompts"),
        ({}, "a\nb\n", "has 2 prompts; at least 4 are needed"),
        ({}, b"\xff\xfe", "is no text in UTF-8"),
        ({"path": "/no/such"}, "a\nb\nc\nd", "/no/such"),
    ],
)
def test_wrong_arguments_are_reported(
    model: dict[str, object], lines: str | bytes | None, reason: str, tmp_path: Path
) -> None:
    arguments = ["tune", "--config", config(tmp_path, **model)]
    if lines is not None:
        path = tmp_path / "prompts.txt"
        path.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
        arguments += ["--prompts", str(path)]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert reason in result.output.replace("\n", " ")
