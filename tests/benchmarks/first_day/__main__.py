"""The command line: ``python -m tests.benchmarks.first_day --minutes 9``."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from diffusers.utils import logging as diffusers_logging

from tests.benchmarks.first_day.carry import carry as carry_packages
from tests.benchmarks.first_day.run import supervise, work


def main(
    minutes: Annotated[float, typer.Option(help="Minutes after which it ends by itself.")] = 9.0,
    output: Annotated[
        Path,
        typer.Option(help="File of the rows, as JSON. With the rows of an earlier call, go on."),
    ] = Path("build/first-day.json"),
    rehearse: Annotated[
        bool, typer.Option(help="On the CPU, with tiny models: shows only that all of it runs.")
    ] = False,
    carry: Annotated[
        Path | None,
        typer.Option(
            help="Instead of measuring, download into this folder what a machine with torch and "
            "transformers lacks, and print the commands for it."
        ),
    ] = None,
    until: Annotated[float | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure everything that the first GPU should tell, each row as soon as it is known."""
    if carry is not None:
        carry_packages(carry, output, minutes)
        return
    if until is not None:
        diffusers_logging.set_verbosity_error()
        status = work(output, until, rehearse)
        sys.stdout.flush()
        os._exit(status)  # a thread may be stuck in a call of the device
    sys.exit(supervise(output, minutes, rehearse))


if __name__ == "__main__":
    typer.run(main)
