"""The demo page: one document, made of three files in this folder."""

import base64
import hashlib
from pathlib import Path

_FOLDER = Path(__file__).parent


def render() -> tuple[str, str]:
    """Return the document, and a content security policy that allows nothing else."""
    html, style, script = (
        (_FOLDER / name).read_text(encoding="utf-8")
        for name in ("index.html", "style.css", "script.js")
    )
    document = html.replace("/* style.css */", style).replace("/* script.js */", script)
    policy = (
        "default-src 'none'; connect-src 'self'; img-src 'self' data: blob:; "
        f"style-src {_source(style)}; script-src {_source(script)}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return document, policy


def _source(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
