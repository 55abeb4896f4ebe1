"""``diffusion-serve top``: watch a deployment in the terminal."""

from typing import Annotated

import typer

from serve_app.config.environment import API_KEY_VARIABLE, api_key_in_environment
from serve_app.errors import DiffusionServeError


def top(
    url: Annotated[str, typer.Argument(help="Address of the server.")] = "http://127.0.0.1:8000",
    key: Annotated[
        str | None,
        typer.Option(
            help=f"API key. Other users of the machine can see it: prefer the environment variable "
            f"{API_KEY_VARIABLE}."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model to show. Default: all of them.")] = None,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two frames.")] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one frame, of --every seconds, and exit.")
    ] = False,
) -> None:
    """Show the metrics of a deployment in the terminal until Ctrl-C."""
    try:
        from rich.console import Console

        from serve_app.top import Server, watch

        server = Server.at(url, key or api_key_in_environment() or None)
        watch(server, Console(markup=False, emoji=False, highlight=False), every, once, model)
    except DiffusionServeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:  # the way to end it
        pass
