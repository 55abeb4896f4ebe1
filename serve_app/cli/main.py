"""The command line, ``diffusion-serve``: one module a command, joined here."""

from typing import Annotated

import typer

from serve_app import __version__
from serve_app.cli.check import check
from serve_app.cli.doctor import doctor
from serve_app.cli.infer import infer
from serve_app.cli.key import key
from serve_app.cli.plan import plan
from serve_app.cli.serve import serve
from serve_app.cli.top import top
from serve_app.cli.tune import tune

cli = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _show_version(enabled: bool) -> None:
    if enabled:
        typer.echo(f"diffusion-serve {__version__}")
        raise typer.Exit


@cli.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Serve diffusers text-to-image models over HTTP, batched step by step."""


_EXIT_CODES = "Exit codes: 0 on success, 2 for a wrong argument, file or setting."
_SERVER_EXIT_CODES = (
    "Exit codes: 0 after Ctrl-C, 2 for a wrong argument, file or setting, before Ray starts."
)
_DOCTOR_EXIT_CODES = (
    "Exit codes: 0 if no check failed, 1 if one failed, 2 for a wrong argument or file."
)

for command, exit_codes in (
    (serve, _SERVER_EXIT_CODES),
    (check, _EXIT_CODES),
    (infer, _EXIT_CODES),
    (key, _EXIT_CODES),
    (plan, _EXIT_CODES),
    (tune, _EXIT_CODES),
    (doctor, _DOCTOR_EXIT_CODES),
    (top, _EXIT_CODES),
):
    cli.command(epilog=exit_codes)(command)
