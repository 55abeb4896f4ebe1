"""What the pages of docs/ may call, in double braces; mkdocs-macros loads this module."""

from typing import Any

from tools.docs.reference.macros import REFERENCE
from tools.docs.results import results

MACROS = (results, *REFERENCE)


def define_env(env: Any) -> None:
    """Register the macros; ``env`` is mkdocs-macros' environment."""
    for macro in MACROS:
        env.macro(macro)
