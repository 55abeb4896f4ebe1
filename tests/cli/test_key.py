"""``diffusion-serve key``: an API key and its entry."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve_app.cli import cli
from serve_app.errors import InvalidKey
from serve_app.gateway.auth import KeyRing, Principal


def test_a_key_is_made_and_only_its_hash_is_written(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    secrets = []
    for arguments in (
        ["mobile app"],
        ["nightly", "--priority", "batch"],
        ["partner", "--model", "org/large", "--model", "small"],
    ):
        made = CliRunner().invoke(cli, ["key", *arguments])
        assert made.exit_code == 0, made.output
        secrets.append(made.stderr.split()[-1])
        assert secrets[-1] not in made.stdout
        with path.open("a") as file:
            file.write(made.stdout)
    keys = KeyRing(path, None)
    assert [keys.enter(keys.recognise(f"Bearer {secret}")) for secret in secrets] == [
        Principal("mobile app", "interactive"),
        Principal("nightly", "batch"),
        Principal("partner", "interactive", ("org/large", "small")),
    ]
    with pytest.raises(InvalidKey):
        keys.recognise("Bearer sk-guessed")
    for option, value in (("max-concurrent", "0"), ("priority", "high")):
        wrong = CliRunner().invoke(cli, ["key", "x", f"--{option}", value])
        assert wrong.exit_code == 2
        assert option.replace("-", "_") in wrong.output
