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

cli = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _show_version(enabled: bool) -> None:
    if enabled:
        typer.echo(f"diffusion-serve {__version__}")
        raise typer.Exit


@cli.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Text-to-image models in production, batched step by step."""


for command in (serve, check, infer, key, plan, doctor, top):
    cli.command()(command)
