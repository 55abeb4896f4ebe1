"""``diffusion-serve key``: make an API key."""

import secrets
from typing import Annotated, Literal

import typer
import yaml

from serve_app.errors import ConfigError


def key(
    name: Annotated[str, typer.Argument(help="Name of the client in logs and metrics.")],
    requests_per_minute: Annotated[
        int | None, typer.Option(help="Most requests in a minute. Default: no limit.")
    ] = None,
    max_concurrent: Annotated[
        int | None, typer.Option(help="Most requests at a time. Default: no limit.")
    ] = None,
    priority: Annotated[
        Literal["interactive", "batch"] | None,
        typer.Option(
            help="Requests of 'batch' run when no interactive request can. Default: 'interactive'."
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Model that it may use; repeat the option for more. Default: all."),
    ] = None,
) -> None:
    """Make an API key.

    Its entry for the file of keys goes to stdout. The key itself goes to stderr, once.
    """
    from serve_app.gateway.auth import digest, parse_keys

    secret = f"sk-{secrets.token_urlsafe(32)}"
    fields = {
        "requests_per_minute": requests_per_minute,
        "max_concurrent": max_concurrent,
        "priority": priority,
        "models": model or None,
    }
    given = {field: value for field, value in fields.items() if value is not None}
    entry = yaml.safe_dump(
        [{"name": name, "sha256": digest(secret)} | given], sort_keys=False, allow_unicode=True
    )
    try:
        parse_keys(entry, "this entry")
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(entry, nl=False)
    typer.echo(f"The key, which is not stored: {secret}", err=True)
