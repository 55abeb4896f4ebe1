"""Render the measured table of README.md from its results: ``python -m tools.docs.readme``."""

import re
from pathlib import Path

from tools.docs.tables import engine_table

README = Path(__file__).parents[2] / "README.md"

BEGIN, END = "<!-- results: engine -->", "<!-- end -->"


def rendered(text: str) -> str:
    """Return the text with the table of the engine between its two comments.

    Raises:
        ValueError: The text has no such block, or several.
    """
    block = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if len(block.findall(text)) != 1:
        raise ValueError(f"there must be exactly one block from {BEGIN} to {END}.")
    return block.sub(lambda _: f"{BEGIN}\n{engine_table()}\n{END}", text)


def main(path: Path = README) -> None:
    """Rewrite the block of the file."""
    path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
