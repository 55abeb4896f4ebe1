"""Runs the blocks of a page as a reader does: in order, in one folder like the repository's root.

The folder is a copy, so that no block can change the repository. Blocks of a language share a
process: exported variables, the working folder and Python's names stay for the next block.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from time import monotonic

from tests.docs.interpreter import Failed, Interpreter
from tests.serve_process import BIN, ROOT, free_port, new_folder, start_program
from tools.docs.blocks import Block, Page

LIMIT_S = 480.0
"""Time limit of a block."""

INSTALL_LIMIT_S = 1800.0
"""Time limit of a block that only a test of its own runs."""

NOT_KEPT = (
    "COLORTERM",
    "DIFFUSION_SERVE_",
    "DOCKER_",
    "FORCE_COLOR",
    "KUBE",
    "PYTEST_",
    "PYTHONPATH",
    "RAY_ADDRESS",
    "VIRTUAL_ENV",
    "XDG_",
)
"""Beginnings of variables that would let a block use another cluster, environment or key."""

_SERVE = re.compile(r"\bdiffusion-serve serve\b(?P<rest>(?:\\\n|[^\n])*)")
_MAKE_SERVE = re.compile(r"\bmake serve\b(?P<rest>[^\n#]*)")
_TOP = re.compile(r"\bdiffusion-serve top\b(?P<rest>[^\n#|>]*)")


def tracked_files() -> list[str]:
    """Return the files of the repository, with new ones that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return sorted({name for name in listed.stdout.split("\0") if (ROOT / name).is_file()})


class Workspace:
    """A copy of the repository in a folder of its own, with an empty home beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "diffusion-serve"
        for name in tracked_files():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, path)
        for name in ("home", "tmp"):
            (folder / name).mkdir(exist_ok=True)

    def _add_virtual_environment(self) -> None:
        """Make ``.venv`` for ``make``: commands that call those of the running interpreter.

        The folder is not the real environment, so that nothing can be installed into that.
        """
        commands = self.root / ".venv" / "bin"
        commands.mkdir(parents=True)
        for program in BIN.iterdir():
            if program.is_file() and os.access(program, os.X_OK):
                command = commands / program.name
                command.write_text(f'#!/bin/sh\nexec "{program}" "$@"\n')
                command.chmod(0o755)
        for name in ("installed", "tested"):
            (self.root / ".venv" / name).touch()

    def environment(self, path: str = "") -> dict[str, str]:
        """Return the variables of the blocks; ``path`` comes first in PATH."""
        ours = {
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder / "tmp"),
            "PATH": f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"],
            "NO_COLOR": "1",
            "TERM": "dumb",
            "LC_ALL": "C.UTF-8",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith(NOT_KEPT)}
        return kept | ours

    def use_packages(self) -> dict[str, str]:
        """Return the variables of a reader who has installed all; pip cannot install more."""
        self._add_virtual_environment()
        no_pip = {"PIP_NO_INDEX": "1", "PIP_DRY_RUN": "1"}
        return self.environment(str(BIN)) | no_pip | {"PYTHONPATH": str(self.root)}

    def strangers(self) -> list[str]:
        """Return what a block has written beside the folder of the repository."""
        ours = {"diffusion-serve", "home", "tmp"}
        return sorted(path.name for path in self.folder.iterdir() if path.name not in ours)


class PageRunner:
    """Runs the blocks of one page; ``close`` ends what they started."""

    def __init__(self, workspace: Workspace, environment: Mapping[str, str]) -> None:
        self._workspace = workspace
        self._environment = dict(environment)
        self.took_s: list[tuple[Block, float]] = []
        """The blocks that ran, and the seconds that each took."""
        self._address: str | None = None
        self._shown_port = 8000
        self._interpreters: dict[str, Interpreter] = {}
        self._server = ExitStack()

    def run(self, page: Page, url: str | None = None, also: str = "") -> None:
        """Run all blocks of the page that a test runs.

        Args:
            page: The page.
            url: The running server of a page that needs one.
            also: Run blocks that are not run for this reason, too.

        Raises:
            AssertionError: a block failed, ran too long or wrote elsewhere. The message has its
                place, its text and its output.
        """
        self._address = None if url is None else url.removeprefix("http://")
        try:
            for block in page.blocks:
                if block.runs or (also and block.not_run == also):
                    started_at = monotonic()
                    self._run(block, LIMIT_S if block.runs else INSTALL_LIMIT_S)
                    self.took_s.append((block, monotonic() - started_at))
        finally:
            self._close(page)

    def _run(self, block: Block, limit_s: float) -> None:
        output = ""
        try:
            if block.starts_server:
                self._start_server(block)
            else:
                code = self._here(block.text)
                name = block.page if block.language == "python" else ""
                # Tracebacks name the line of the page.
                padding = "\n" * block.line if name else ""
                output = self._interpreter(block.language).run(padding + code, limit_s, name)
        except Failed as failed:
            raise AssertionError(_report(block, *failed.args)) from None
        if found := self._workspace.strangers():
            reason = f"wrote outside the repository's folder: {', '.join(found)}"
            raise AssertionError(_report(block, reason, output))

    def _interpreter(self, language: str) -> Interpreter:
        if language not in self._interpreters:
            environment = self._exported() if language != "sh" else self._environment
            self._interpreters[language] = Interpreter(language, self._workspace.root, environment)
        return self._interpreters[language]

    def _exported(self) -> dict[str, str]:
        """Return the environment with the variables that blocks of the shell have exported."""
        shell = self._interpreters.get("sh")
        return self._environment if shell is None else shell.environment()

    def _start_server(self, block: Block) -> None:
        """Start the block's server on a free port, instead of an earlier one, and wait for it."""
        self._server.close()
        port = free_port()
        command = on_port(block.text, port)
        if command is None:
            raise Failed("starts neither `diffusion-serve serve` nor `make serve`", "")
        running = start_program(
            ["bash", "-euo", "pipefail", "-c", command],
            new_folder(),
            self._exported(),
            self._workspace.root,
        )
        self._server.callback(running.stop)
        try:
            running.wait_until_ready(f"http://127.0.0.1:{port}")
        except AssertionError as error:
            reason = str(error) if running.process.poll() is None else "the server ended"
            raise Failed(reason, running.log.read_text(errors="replace")) from None
        self._address = f"127.0.0.1:{port}"
        named = re.search(r"\s--port[ =](\d+)", block.text)
        self._shown_port = int(named[1]) if named else 8000

    def _here(self, text: str) -> str:
        """Put the address of the running server in the place of the shown one."""
        if self._address is None:
            return text
        address = f"http://{self._address}"
        shown = rf"(?:localhost|127\.0\.0\.1):{self._shown_port}\b"
        text = re.sub(shown, self._address, text)
        return _TOP.sub(
            lambda top: (
                top[0] if "http" in top["rest"] else f"diffusion-serve top {address}{top['rest']}"
            ),
            text,
        )

    def _close(self, page: Page) -> None:
        """End the server and the interpreters; fail if Python's end fails."""
        self._server.close()
        problems = []
        for language, interpreter in self._interpreters.items():
            try:
                interpreter.close()
            except Failed as failed:
                reason, output = failed.args
                problems.append(f"{page.path}: {language}: {reason}\n{output[-5000:]}")
        self._interpreters = {}
        assert not problems, "\n".join(problems)


def on_port(text: str, port: int) -> str | None:
    """Let a block's server listen on this port; None if the block does not start one."""

    def serve(found: re.Match[str]) -> str:
        rest = re.sub(r"\s--port[ =]\d+", "", found["rest"])
        return f"diffusion-serve serve --port {port}{rest}"

    def make(found: re.Match[str]) -> str:
        host = re.search(r"\sHOST=(\S+)", found["rest"])
        rest = found["rest"].replace(host[0], "") if host else found["rest"]
        # The Makefile ends the command of the server with its host.
        return f"make serve HOST='{host[1] if host else '127.0.0.1'} --port {port}'{rest}"

    for pattern, replacement in ((_SERVE, serve), (_MAKE_SERVE, make)):
        if pattern.search(text):
            return pattern.sub(replacement, text, count=1)
    return None


def _report(block: Block, reason: str, output: str) -> str:
    return f"{block.place}: {reason}\n--- the block\n{block.text}--- its output\n{output[-5000:]}"
