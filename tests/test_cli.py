"""The command line, as a process of its own where that matters."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from serve_app import __version__
from serve_app.cli import cli
from serve_app.errors import InvalidKey
from serve_app.gateway.auth import KeyRing
from tools.demo_model.judge import read

ROOT = Path(__file__).parents[1]
PROGRAM = Path(sys.executable).with_name("diffusion-serve")


def _infer(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["infer", *arguments])
    return result.exit_code, result.output


def test_the_installed_program_paints_with_a_progress_bar(tmp_path: Path) -> None:
    output = tmp_path / "cat.png"
    done = subprocess.run(
        [PROGRAM, "infer", "--prompt", "a red circle on a blue background", "--seed", "1",
         "--steps", "20", "--output", output],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "seed 1" in done.stdout
    assert "20/20" in done.stderr
    assert "Warning" not in done.stderr
    seen = read(np.asarray(Image.open(output)))
    assert seen.background == "blue"
    assert [(item.color, item.shape) for item in seen.objects] == [("red", "circle")]


def test_every_option_is_heeded(tmp_path: Path) -> None:
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


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    code, text = _infer("--prompt", "a cat", "--steps", "1", "--output", str(tmp_path / "x.png"))
    assert code == 2
    assert "cannot be written" in text


def test_check_answers_before_ray_is_started(tmp_path: Path) -> None:
    good = Path(__file__).parents[1] / "configs" / "demo.yaml"
    assert CliRunner().invoke(cli, ["check", str(good)]).exit_code == 0
    bad = tmp_path / "bad.yaml"
    bad.write_text(good.read_text().replace("max_steps", "max_stepz"))
    result = CliRunner().invoke(cli, ["check", str(bad)])
    assert result.exit_code == 2
    assert "engine.limits.max_stepz: unknown key" in result.output


def test_version() -> None:
    assert __version__ in CliRunner().invoke(cli, ["--version"]).output


def test_a_key_is_made_and_only_its_hash_is_written(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    secrets = []
    for arguments in (["mobile app"], ["nightly", "--priority", "batch"]):
        made = CliRunner().invoke(cli, ["key", *arguments])
        assert made.exit_code == 0, made.output
        secrets.append(made.stderr.split()[-1])
        assert secrets[-1] not in made.stdout
        with path.open("a") as file:
            file.write(made.stdout)
    keys = KeyRing(path, None)
    assert [keys.enter(keys.recognise(f"Bearer {secret}")) for secret in secrets] == [
        ("mobile app", "interactive"),
        ("nightly", "batch"),
    ]
    with pytest.raises(InvalidKey):
        keys.recognise("Bearer sk-guessed")
    for option, value in (("max-concurrent", "0"), ("priority", "high")):
        wrong = CliRunner().invoke(cli, ["key", "x", f"--{option}", value])
        assert wrong.exit_code == 2
        assert option.replace("-", "_") in wrong.output


def test_check_looks_at_the_keys(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    text = (ROOT / "configs" / "demo.yaml").read_text()
    args = "    args:\n      gateway:\n        keys_path: /no/keys.yaml\n"
    config.write_text(text.replace("    args:\n", args))
    done = CliRunner().invoke(cli, ["check", str(config)])
    assert done.exit_code == 2
    assert "/no/keys.yaml cannot be read" in done.output


def test_check_looks_at_the_knobs_of_the_scaling_policy(tmp_path: Path) -> None:
    good = ROOT / "configs" / "sdxl.yaml"
    assert CliRunner().invoke(cli, ["check", str(good)]).exit_code == 0
    bad = tmp_path / "bad.yaml"
    bad.write_text(good.read_text().replace("hold_s:", "hold:"))
    done = CliRunner().invoke(cli, ["check", str(bad)])
    assert done.exit_code == 2
    assert "policy_kwargs.hold: unknown key" in done.output


def test_check_says_when_serve_would_not_do_what_the_policy_says(tmp_path: Path) -> None:
    good, path = (ROOT / "configs" / "sdxl.yaml").read_text(), tmp_path / "serve.yaml"
    path.write_text(good.replace("          downscale_delay_s: 0\n", ""))
    done = CliRunner().invoke(cli, ["check", str(path)])
    assert done.exit_code == 2
    assert "autoscaling_config.downscale_delay_s is 600.0, Serve's default" in done.output
    path.write_text(good.replace("serve_app.autoscaling.ray_policy:WorkPolicy", "mine:Policy"))
    done = CliRunner().invoke(cli, ["check", str(path)])
    assert done.exit_code == 0
    assert "warning" in done.stderr
    assert "scaled by mine:Policy, which is not checked" in done.stderr
