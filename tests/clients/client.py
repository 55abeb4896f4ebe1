"""A client whose calls are made, and what came of each."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

PROGRAMS = Path(__file__).parent / "programs"

LIMIT_S = 240.0
"""Time limit of all calls of a client."""

Outcomes = dict[str, dict[str, Any]]
"""By the name of the call: ``images`` with their sizes, or the ``status`` and ``message`` of the
error."""


class Client(Protocol):
    """A client of the API."""

    name: str
    how: str
    """How its calls are made."""

    def version(self) -> str:
        """Return its version; empty if there is none."""
        ...

    def make(self, url: str, calls: Sequence[str]) -> Outcomes:
        """Make these calls, or all of them without any, to a server."""
        ...


@dataclass(frozen=True, eq=False)
class Program:
    """A client that a program of `PROGRAMS` uses, in an environment of its own."""

    name: str
    package: str
    """Package with the client, whose version is shown."""
    command: tuple[str, ...]
    """The interpreter, and the file of the program."""
    folder: Path
    """Folder with the files ``image.png`` and ``mask.png``, and for Node.js the packages."""
    variables: dict[str, str] = field(default_factory=dict)
    how: str = "run"

    def version(self) -> str:
        if self.command[0].endswith("node"):
            found = self.folder / "node_modules" / self.package / "package.json"
            version: str = json.loads(found.read_text())["version"]
            return version
        code = f"from importlib.metadata import version; print(version({self.package!r}))"
        return self._output([self.command[0], "-c", code]).strip()

    def make(self, url: str, calls: Sequence[str]) -> Outcomes:
        outcomes: Outcomes = json.loads(self._output([*self.command, f"{url}/v1", *calls]))
        return outcomes

    def _output(self, command: Sequence[str]) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={name: os.environ[name] for name in os.environ if name != "PYTHONPATH"}
            | self.variables,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, f"{self.name}: {done.stdout[-500:]}{done.stderr[-2000:]}"
        return done.stdout


def node() -> str | None:
    """Return the path of Node.js, if it is installed with npm."""
    return shutil.which("node") if shutil.which("npm") else None
