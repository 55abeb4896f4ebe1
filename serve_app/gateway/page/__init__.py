"""The demo page: one document with its style, and the JavaScript modules that it imports."""

import base64
import hashlib
from pathlib import Path

_FOLDER = Path(__file__).parent


def render() -> tuple[str, str]:
    """Return the document, and a content security policy that allows nothing else."""
    html, style = (
        (_FOLDER / name).read_text(encoding="utf-8") for name in ("index.html", "style.css")
    )
    document = html.replace("/* style.css */", style)
    script = html.partition("<script>")[2].partition("</script>")[0]
    policy = (
        "default-src 'none'",
        "connect-src 'self'",
        "img-src 'self' data: blob:",
        f"style-src {_digest(style)}",
        f"script-src 'self' {_digest(script)}",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return document, "; ".join(policy)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def scripts() -> dict[str, str]:
    """Return the text of each module by its file name."""
    return {path.name: path.read_text(encoding="utf-8") for path in _FOLDER.glob("*.js")}
