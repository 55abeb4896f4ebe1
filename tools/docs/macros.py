"""What the pages of docs/ may call, in double braces; mkdocs-macros loads this module."""

from typing import Any

from tools.docs.models import family_table, model_table
from tools.docs.results import results


def define_env(env: Any) -> None:
    """Register the macros; ``env`` is mkdocs-macros' environment."""
    env.macro(results)
    env.macro(family_table)
    env.macro(model_table)
