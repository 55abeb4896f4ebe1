"""``diffusion-serve infer``, as a process of its own where that matters."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from serve_app.cli import cli
from serve_app.config.source import DEMO_MODEL_DIR
from tests.cli.server import PROGRAM
from tests.safety_checkers import FLAGS_EVERYTHING, save_with_checker
from tools.demo_model.judge import read


def _infer(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["infer", *arguments])
    return result.exit_code, result.output


@pytest.mark.slow
def test_the_installed_program_generates_an_image_with_a_progress_bar(tmp_path: Path) -> None:
    output = tmp_path / "cat.png"
    done = subprocess.run(
        [PROGRAM, "infer", "--prompt", "a red circle on a blue background", "--seed", "1",
         "--steps", "20", "--output", output],
        capture_output=True, text=True, timeout=480, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "seed 1" in done.stdout
    assert "20/20" in done.stderr
    assert "Warning" not in done.stderr
    seen = read(np.asarray(Image.open(output)))
    assert seen.background == "blue"
    assert [(item.color, item.shape) for item in seen.objects] == [("red", "circle")]


def test_every_option_has_an_effect(tmp_path: Path) -> None:
    output = tmp_path / "x.jpg"
    code, text = _infer(
        "--prompt", "two small yellow squares on black", "--output", str(output), "--model", "demo",
        "--steps", "3", "--seed", "5", "--size", "96x48", "--negative-prompt", "red",
        "--guidance-scale", "2",
    )  # fmt: skip
    assert code == 0, text
    with Image.open(output) as image:
        assert image.format == "JPEG"
        assert image.size == (96, 48)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output", "x.gif"], "must end in .png"),
        (["--output", "/no/such/folder/x.png"], "does not exist"),
        (["--size", "64"], "WIDTHxHEIGHT"),
        (["--size", "60x64"], "multiples of 8"),
        (["--steps", "0"], "num_inference_steps"),
        (["--seed", "-1"], "seed"),
        (["--model", "/no/such/model"], "/no/such/model does not exist"),
        (["--prompt", " "], "prompt must not be empty"),
    ],
)
def test_mistakes_end_with_2_and_say_what_to_do(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    output = tmp_path / "x.png"
    code, text = _infer("--prompt", "a cat", "--output", str(output), *arguments)
    assert code == 2
    assert words in text
    assert text.count("error: ") == 1
    assert not output.exists()


def test_an_image_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    """Zero-SNR betas leave no signal at the first step, and epsilon prediction divides by it."""
    model, output = tmp_path / "model", tmp_path / "x.png"
    shutil.copytree(DEMO_MODEL_DIR, model)
    path = model / "scheduler" / "scheduler_config.json"
    changes = {"prediction_type": "epsilon", "rescale_betas_zero_snr": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    code, text = _infer("--prompt", "a cat", "--model", str(model), "--output", str(output))
    assert code == 2
    assert "the output of unet is NaN or infinite" in text
    assert "scheduler_config.json" in text
    assert text.count("error: ") == 1
    assert not output.exists()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    code, text = _infer("--prompt", "a cat", "--steps", "1", "--output", str(tmp_path / "x.png"))
    assert code == 2
    assert "cannot be written" in text


def test_a_flagged_image_is_written_with_a_warning(tmp_path: Path) -> None:
    save_with_checker(tmp_path / "model", FLAGS_EVERYTHING)
    output = tmp_path / "x.png"
    code, text = _infer(
        "--prompt", "a red circle", "--model", str(tmp_path / "model"), "--steps", "2",
        "--seed", "5", "--output", str(output),
    )  # fmt: skip
    assert code == 0, text
    assert "warning: the safety checker flagged the image with seed 5" in text
    with Image.open(output) as image:
        assert image.getextrema() != ((0, 0),) * 3, "it is not black"
