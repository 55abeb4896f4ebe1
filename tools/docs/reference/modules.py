"""The module list of the architecture page: the first line of each module's docstring."""

import ast
from pathlib import Path

from tools.docs.markdown import code, prose, table

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "serve_app"


def modules() -> str:
    """Return a section for each package below ``serve_app``, with a table of its modules."""
    parts = []
    folders = sorted({path.parent for path in PACKAGE.rglob("*.py")})
    for folder in folders:
        rows = [
            (code(path.name), summary(path))
            for path in sorted(folder.glob("*.py"))
            if path.name != "__init__.py"
        ]
        name = folder.relative_to(ROOT).as_posix()
        parts += [f"### {code(f'{name}/')}", summary(folder / "__init__.py")]
        if rows:
            parts += [table(("Module", "Content"), rows)]
    return "\n\n".join(parts)


def summary(path: Path) -> str:
    """Return the first paragraph of a module's docstring; empty if it has none."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return prose(docstring.split("\n\n")[0])
