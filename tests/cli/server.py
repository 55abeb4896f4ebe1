"""``diffusion-serve serve`` as a process of its own, with a Ray cluster of its own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.serve_process import BIN, ServeProcess, new_folder, start_program

PROGRAM = BIN / "diffusion-serve"


@contextmanager
def serving(
    arguments: list[str],
    program: Path = PROGRAM,
    cwd: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[ServeProcess]:
    """Run ``diffusion-serve serve`` until the block ends, apart from every other Ray cluster."""
    running = start_program([program, "serve", *arguments], new_folder(), variables, cwd)
    try:
        yield running
    finally:
        running.stop()
