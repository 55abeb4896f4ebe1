"""The common parts of all commands: the version, shell completion, quick failures."""

from typer.testing import CliRunner

from serve_app import __version__
from serve_app.cli import cli


def test_the_version_is_that_of_the_package() -> None:
    assert __version__ in CliRunner().invoke(cli, ["--version"]).output


def test_shells_can_complete_commands() -> None:
    result = CliRunner().invoke(cli, ["--show-completion", "bash"], prog_name="diffusion-serve")
    assert result.exit_code == 0, result.output
    assert "diffusion-serve" in result.output
