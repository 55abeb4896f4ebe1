"""A Dockerfile, read; and a target of it, performed where there is no Docker.

Of Dockerfiles it knows what ours uses, and refuses the rest.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

KNOWN = ("ARG", "CMD", "COPY", "ENV", "EXPOSE", "HEALTHCHECK", "LABEL", "RUN", "USER", "VOLUME",
         "WORKDIR")  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    keyword: str
    value: str
    line: int


@dataclass(frozen=True)
class Stage:
    name: str
    base: str
    """A stage, or an image by its name, in which ``$`` stands for an argument."""
    instructions: tuple[Instruction, ...]


class Dockerfile:
    def __init__(self, text: str) -> None:
        self.arguments: dict[str, str] = {}
        """Declared before the first stage, with their defaults."""
        self.stages: dict[str, Stage] = {}
        found: list[tuple[str, str, list[Instruction]]] = []
        for one in _instructions(text):
            if one.keyword == "FROM":
                match = re.fullmatch(r"(\S+) AS (\S+)", one.value)
                assert match, f"line {one.line}: not FROM IMAGE AS STAGE"
                found.append((match[2], match[1], []))
            elif not found:
                assert one.keyword == "ARG", f"line {one.line}: {one.keyword} before FROM"
                self.arguments |= [_argument(one)]
            else:
                assert one.keyword in KNOWN, f"line {one.line}: {one.keyword} is not known here"
                found[-1][2].append(one)
        for name, base, instructions in found:
            self.stages[name] = Stage(name, base, tuple(instructions))

    def lineage(self, target: str) -> Iterator[Instruction]:
        """What makes a stage, those that it is built on first."""
        stage = self.stages[target]
        if stage.base in self.stages:
            yield from self.lineage(stage.base)
        yield from stage.instructions

    def of(self, target: str, keyword: str) -> list[str]:
        """The values of all instructions of a kind that make a stage."""
        return [one.value for one in self.lineage(target) if one.keyword == keyword]

    def environment(self, target: str) -> dict[str, str]:
        return dict(pair for value in self.of(target, "ENV") for pair in pairs(value))

    def defaults(self, target: str) -> dict[str, str]:
        """The arguments of a stage, those of its bases too."""
        given: dict[str, str] = {}
        for value in self.of(target, "ARG"):
            name, equals, default = value.partition("=")
            given[name] = default if equals else self.arguments[name]
        return given


def pairs(value: str) -> list[tuple[str, str]]:
    """Of an ENV or a LABEL."""
    return [(name, text) for name, _, text in (one.partition("=") for one in shlex.split(value))]


def _argument(one: Instruction) -> tuple[str, str]:
    name, _, default = one.value.partition("=")
    return name, default


def _instructions(text: str) -> Iterator[Instruction]:
    joined = ""
    begins = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("#") or not line.strip():
            continue
        begins = begins if joined else number
        joined += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        keyword, _, value = joined.strip().partition(" ")
        assert "<<" not in value, f"line {begins}: here-documents are not known here"
        yield Instruction(keyword, value.strip(), begins)
        joined = ""


class Ignored:
    """What a .dockerignore keeps out, by Docker's rules, which are not git's.

    A pattern is anchored at the root, the last one that matches wins, and one that matches a folder
    holds for what is in it.
    """

    def __init__(self, text: str) -> None:
        lines = [line.strip() for line in text.splitlines()]
        self._rules = [
            (line.startswith("!"), _pattern(line.removeprefix("!").strip("/")))
            for line in lines
            if line and not line.startswith("#")
        ]

    def __contains__(self, path: str) -> bool:
        parts = path.split("/")
        folders = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        out = False
        for brings_back, pattern in self._rules:
            if brings_back == out and any(pattern.fullmatch(folder) for folder in folders):
                out = not brings_back
        return out


def _pattern(text: str) -> re.Pattern[str]:
    assert not re.search(r"[\\\[\]]", text), f"{text!r}: classes and escapes are not known here"
    translated = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?)", text)
    return re.compile("".join(translated.get(piece, re.escape(piece)) for piece in pieces))


class StepFailed(Exception):
    """A RUN ended with an error; the message has the end of what it printed."""


OWN_FOLDERS = re.compile(r"(?<![\w./-])/(app|cache|home|opt|root)\b")
"""The container's folders that are this Dockerfile's. Here they lie below a folder of the test."""

PASSED_ON = re.compile(r"PIP_|SSL_|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|(https?|no)_proxy", re.I)
"""Of this machine's environment: how pip reaches packages. A build is told so by its arguments."""


class Build:
    """Performs a target's steps, one after another, in a folder that stands for the container's.

    This machine stands for the base image and for the stage ``base``: its programs, its user, its
    Python. Of that stage only RUN is left out. Each stage starts from the files of the one that it
    is built on, and gets of others what it copies.
    """

    def __init__(
        self, file: Dockerfile, context: Path, ignored: Ignored, folder: Path,
        arguments: Mapping[str, str],
    ) -> None:  # fmt: skip
        self._file = file
        self._context = context
        self._ignored = ignored
        self.root = folder / "container"
        """The files of the stage that is being built, at last of the target."""
        self._built = folder / "stages"
        self._given = arguments
        self._programs = folder / "bin"
        self._programs.mkdir(parents=True)
        (self._programs / "python").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
        self.environment: dict[str, str] = {}
        self.workdir = Path()

    def perform(self, target: str) -> None:
        for stage in self._needed(target):
            base = self._file.stages[stage].base
            if base in self._file.stages:
                shutil.copytree(self._built / base, self.root, symlinks=True)
            else:
                self.root.mkdir(parents=True)
            self._start()
            for one in self._file.lineage(stage):
                runs = one in self._file.stages[stage].instructions
                self._follow(one, runs and stage != "base")
            if stage != target:
                self.root.rename(self._built / stage)

    def run(self, command: str, timeout_s: float = 600) -> str:
        """What it printed, from the container's working directory and with its environment.

        Raises:
            StepFailed: if it ends with an error.
        """
        done = subprocess.run(
            ["/bin/sh", "-c", self._here(command)], cwd=self.workdir, env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s,
            check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise StepFailed(f"{command}\nended with {done.returncode}:\n{done.stdout[-4000:]}")
        return done.stdout

    def _needed(self, target: str) -> list[str]:
        """Stages in the order of the file, each after those that it stands on or copies from."""
        needed = {target}
        for stage in reversed(self._file.stages.values()):
            if stage.name in needed:
                copied = [one.value for one in stage.instructions if one.keyword == "COPY"]
                needed |= {stage.base, *re.findall(r"--from=(\S+)", " ".join(copied))}
        return [name for name in self._file.stages if name in needed]

    def _start(self) -> None:
        self.workdir = self.root
        passed_on = {name: value for name, value in os.environ.items() if PASSED_ON.match(name)}
        home = self.root / "root"
        home.mkdir(exist_ok=True)
        self.environment = passed_on | {
            "HOME": str(home),
            "PATH": f"{self._programs}:/usr/bin:/bin",
        }
        self._built.mkdir(exist_ok=True)

    def _here(self, text: str) -> str:
        return OWN_FOLDERS.sub(rf"{self.root}/\1", text)

    def _follow(self, one: Instruction, acts: bool) -> None:
        """``acts``: whether it also changes files; else they are as it left them."""
        match one.keyword:
            case "ARG":
                name, default = _argument(one)
                if "=" not in one.value:
                    default = self._file.arguments[name]
                self.environment[name] = self._given.get(name, default)
            case "ENV":
                value = Template(self._here(one.value)).substitute(self.environment)
                self.environment |= pairs(value)
                Path(self.environment["HOME"]).mkdir(parents=True, exist_ok=True)
            case "WORKDIR":
                self.workdir = self.workdir / self._here(one.value)
                self.workdir.mkdir(parents=True, exist_ok=True)
            case "COPY" if acts:
                self._copy(one)
            case "RUN" if acts:
                self.run(one.value)

    def _copy(self, one: Instruction) -> None:
        words = shlex.split(one.value)
        options = [word for word in words if word.startswith("--")]
        *sources, target = [word for word in words if not word.startswith("--")]
        into = self.workdir / self._here(target)
        for source in sources:
            if options:
                start = self._built / options[0].removeprefix("--from=") / source.lstrip("/")
                files = list(_files(start))
            else:
                start = self._context / source
                files = [path for path in _files(start) if self._name(path) not in self._ignored]
            assert files, f"line {one.line}: there is no {source} to copy"
            assert start.is_dir() or target.endswith("/"), (
                f"line {one.line}: {target} is no folder/"
            )
            for path in files:
                name = path.relative_to(start) if start.is_dir() else Path(path.name)
                copy = into / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.unlink(missing_ok=True)
                if path.is_symlink():
                    copy.symlink_to(path.readlink())
                elif options:
                    copy.hardlink_to(path)  # what is built is not written to again
                else:
                    shutil.copy2(path, copy)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._context).as_posix()


def _files(start: Path) -> Iterator[Path]:
    """It, or all files and links below it."""
    if not start.is_dir():
        yield from [start] if start.exists() else []
        return
    for folder, folders, files in os.walk(start):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        yield from (Path(folder) / name for name in [*files, *links])
