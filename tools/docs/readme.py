"""Render the measured table of README.md from its results: ``python -m tools.docs.readme``."""

import re
from pathlib import Path
from textwrap import fill

from tools.docs.results import results
from tools.docs.tables import engine_table, hardware

README = Path(__file__).parents[2] / "README.md"

BEGIN, END = "<!-- results: engine -->", "<!-- end -->"


def measured() -> str:
    """Return the table of the engine with its load, its hardware and its command."""
    name = "engine-demo-cpu"
    content = results(name)
    command, _, _ = content["command"].partition(" --output")
    load = max(row["load"] for row in content["rows"])
    about = (
        f"The demo model under {load:g} times the load that one request at a time can serve. "
        f'"In time" is the share within {content["slo_scale"]:g} times the solo time. '
        f"Hardware: {hardware(name)}."
    )
    return f"{engine_table(load)}\n\n{fill(about, 100)}\nCommand: `{command}`."


def rendered(text: str) -> str:
    """Return the text with the measured table between its two comments.

    Raises:
        ValueError: The text has no such block, or several.
    """
    block = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if len(block.findall(text)) != 1:
        raise ValueError(f"there must be exactly one block from {BEGIN} to {END}.")
    return block.sub(lambda _: f"{BEGIN}\n{measured()}\n{END}", text)


def main(path: Path = README) -> None:
    """Rewrite the block of the file."""
    path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
