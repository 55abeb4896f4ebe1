"""``diffusion-serve serve`` as a process of its own, with a Ray cluster of its own."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.conftest import ServeProcess

PROGRAM = Path(sys.executable).with_name("diffusion-serve")


@contextmanager
def serving(
    arguments: list[str],
    program: Path = PROGRAM,
    cwd: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[ServeProcess]:
    """Run ``diffusion-serve serve`` until the block ends, apart from every other Ray cluster."""
    folder = Path(tempfile.mkdtemp(prefix="ds", dir="/tmp"))  # short: for Ray's sockets
    log = folder / "serve.log"
    environment = os.environ | {
        "RAY_ADDRESS": "local",
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        **(variables or {}),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program, "serve", *arguments],
            cwd=cwd,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    running = ServeProcess(process, folder, log)
    try:
        yield running
    finally:
        running.stop()
