"""The command line. Commands import heavy libraries late, so that mistakes end at once."""

from serve_app.cli.main import cli

__all__ = ["cli"]
