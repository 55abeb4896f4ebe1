"""Renders a page as the site does, without building the site."""

from functools import cache
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from tools.docs.macros import MACROS

FOLDER = Path(__file__).parents[2] / "docs"


@cache
def rendered(name: str) -> str:
    """Return the Markdown of ``docs/NAME.md`` after its macros."""
    environment = Environment(undefined=StrictUndefined)
    environment.globals |= {macro.__name__: macro for macro in MACROS}
    return environment.from_string(source(name)).render()


def source(name: str) -> str:
    """Return the Markdown of ``docs/NAME.md`` as it is written."""
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8")
