"""A shell or a Python that runs the blocks of a page one after another, as one terminal does."""

import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp

from tests.serve_process import kill_session
from tests.waiting import wait_until

SHELL = """
while IFS= read -r file; do
    . "$file" </dev/null
    : >"$file.done"
done
"""
"""Run the files whose names come in, in this shell: a failed command ends it."""

PYTHON = """
import os, sys
commands = os.fdopen(os.dup(0))
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
namespace = {"__name__": "__main__"}
for line in commands:
    path, name = line.rstrip("\\n").split("\\t")
    with open(path, encoding="utf-8") as file:
        code = compile(file.read(), name, "exec")
    exec(code, namespace)
    sys.stdout.flush()
    open(path + ".done", "w").close()
"""

# The python is the one of the environment's PATH.
COMMANDS: dict[str, list[str]] = {
    "sh": ["bash", "-euo", "pipefail", "-c", SHELL],
    "python": ["python", "-c", PYTHON],
}


class Failed(Exception):
    """A piece of code failed or ran too long; ``args`` are the reason and its output."""


class Interpreter:
    """A process that runs pieces of code; all of them share its state."""

    def __init__(self, language: str, cwd: Path, environment: Mapping[str, str]) -> None:
        self._folder = Path(mkdtemp(prefix=f"{language}-", dir=environment["TMPDIR"]))
        self._log = self._folder / "output.log"
        self._count = 0
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                COMMANDS[language],
                cwd=cwd,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                text=True,
            )

    def run(self, code: str, limit_s: float, name: str = "") -> str:
        """Run the code and return its output.

        Args:
            code: A program of this language.
            limit_s: Seconds after which the code has failed.
            name: For Python: the file that tracebacks name.

        Raises:
            Failed: the code failed, or took longer than ``limit_s``.
        """
        self._count += 1
        file = self._folder / str(self._count)
        file.write_text(code, encoding="utf-8")
        done = file.with_name(f"{file.name}.done")
        began_at = self._log.stat().st_size
        assert self._process.stdin is not None
        self._process.stdin.write(f"{file}\t{name}\n" if name else f"{file}\n")
        self._process.stdin.flush()
        try:
            wait_until(lambda: done.exists() or self._process.poll() is not None, limit_s)
        except AssertionError:
            self._kill()
            raise Failed(f"ran for more than {limit_s:g} s", self._output(began_at)) from None
        if not done.exists():
            reason = f"exit status {self._process.returncode}"
            raise Failed(reason, self._output(began_at))
        return self._output(began_at)

    def environment(self) -> dict[str, str]:
        """Return the variables that a shell exports."""
        file = self._folder / "environment"
        self.run(f"env -0 >'{file}'", 10)
        pairs = (pair.partition("=") for pair in file.read_text().split("\0") if pair)
        return {name: value for name, _, value in pairs}

    def close(self) -> None:
        """End the process and those that it started.

        Raises:
            Failed: its end failed, or takes longer than 30 s.
        """
        assert self._process.stdin is not None
        already = self._process.poll() is not None
        try:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            raise Failed("does not end", self._output(0)) from None
        finally:
            self._kill()
        if not already and self._process.returncode != 0:
            raise Failed(f"exit status {self._process.returncode} at its end", self._output(0))

    def _kill(self) -> None:
        kill_session(self._process.pid)
        self._process.wait()

    def _output(self, began_at: int) -> str:
        return self._log.read_bytes()[began_at:].decode(errors="replace")
