"""The commands that README.md, images/README.md and compose.yaml show name what is there."""

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml
from typer.main import get_command

from serve_app import __version__
from serve_app.cli import cli
from serve_app.config import read_serve_config
from serve_app.errors import ConfigError
from tests.images.dockerfile import Dockerfile

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "images/README.md")
COMPOSE = ROOT / "images" / "compose.yaml"
COMPOSED = yaml.safe_load(COMPOSE.read_text())
GPUS = re.compile(r'all|"device=[0-9]+(,[0-9]+)*"')
"""The quotes are for Docker, which would take the comma for another option."""


def _commands(text: str) -> list[str]:
    """Those of Docker, in blocks of shell code; a line may go on after a backslash."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("docker ")]


SHOWN = [command for name in DOCUMENTS for command in _commands((ROOT / name).read_text())]


NOT_UNDERSTOOD = (click.UsageError, typer.BadParameter.__base__ or typer.BadParameter)
"""What click, and typer's own copy of it, raise for arguments that a program does not have."""


class Wrong(Exception):
    """What a command names and is not there."""


def _options(words: list[str], flags: set[str], values: set[str]) -> list[tuple[str, str]]:
    """Takes the options off the front of ``words``."""
    found = []
    while words and words[0].startswith("-"):
        option = words.pop(0)
        if option in flags:
            found.append((option, ""))
        elif option in values:
            found.append((option, words.pop(0)))
        else:
            raise Wrong(f"unknown option {option}")
    return found


def _check(command: str, dockerfile: Dockerfile) -> None:
    """Raises `Wrong` for what is not there."""
    words = shlex.split(command)[1:]
    match words.pop(0):
        case "run":
            values = {"-p", "-v", "--env", "--gpus", "--shm-size", "--stop-signal", "--user"}
            options = _options(words, {"--init", "--rm"}, values)
            target = _target(words.pop(0), dockerfile)
            for option, value in options:
                if option == "--gpus" and (not GPUS.fullmatch(value) or target != "gpu"):
                    raise Wrong(f"--gpus {value} with the target {target}")
                if option == "-p" and not value.endswith(f":{dockerfile.of(target, 'EXPOSE')[0]}"):
                    raise Wrong(f"-p {value}")
            _check_program(words)
        case "build":
            values = {"-f", "-t", "--build-arg", "--target"}
            options = _options(words, set(), values)
            if words != ["."]:
                raise Wrong(f"the context {words}")
            given = dict(options)
            if not (ROOT / given["-f"]).is_file():
                raise Wrong(f"no file {given['-f']}")
            if _target(given["-t"], dockerfile) != given["--target"]:
                raise Wrong(f"{given['-t']} for the target {given['--target']}")
            known = {*dockerfile.arguments, *dockerfile.defaults(given["--target"])}
            known |= dockerfile.defaults(f"packages-{given['--target']}").keys()
            for option, value in options:
                if option == "--build-arg" and value.partition("=")[0] not in known:
                    raise Wrong(f"no argument {value}")
        case "compose":
            ((_, file),) = _options(words, set(), {"-f"})
            if (ROOT / file) != COMPOSE or words.pop(0) != "up":
                raise Wrong(command)
            _options(words, {"--build", "--wait"}, set())
            if unknown := set(words) - COMPOSED["services"].keys():
                raise Wrong(f"no service {unknown}")
        case "cp":
            path = words[0].partition(":")[2]
            workdir = dockerfile.of("gpu", "WORKDIR")[-1]
            if path != f"{workdir}/{_default_of('infer', 'output')}":
                raise Wrong(f"nothing is written to {path}")
        case "push":
            (image,) = words
            _target(image, dockerfile)
        case other:
            raise Wrong(f"docker {other} is not known here")


def _target(image: str, dockerfile: Dockerfile) -> str:
    target = image.rpartition("/")[2].removeprefix(f"diffusion-serve:{__version__}-")
    if target not in ("cpu", "gpu") or target not in dockerfile.stages:
        raise Wrong(f"{image} is not diffusion-serve:{__version__}-TARGET")
    return target


def _subcommands(program: str) -> dict[str, Any]:
    match program:
        case "diffusion-serve":
            return get_command(cli).commands  # type: ignore[attr-defined]
        case "serve":
            return importlib.import_module("ray.serve.scripts").cli.commands
        case _:
            raise Wrong(f"no program {program}")


def _check_program(words: list[str]) -> None:
    """The real program parses them, and is not run."""
    program, command, *arguments = words
    found = _subcommands(program).get(command)
    if found is None:
        raise Wrong(f"{program} has no command {command}")
    try:
        found.make_context(command, [*arguments])
        for config in (word for word in arguments if word.endswith(".yaml")):
            if not config.startswith("configs/"):
                raise Wrong(f"{config} is not in the images")
            read_serve_config(ROOT / config)
    except (ConfigError, *NOT_UNDERSTOOD) as error:
        raise Wrong(str(error)) from error


def _default_of(command: str, parameter: str) -> str:
    found = _subcommands("diffusion-serve")[command]
    return str(next(one.default for one in found.params if one.name == parameter))


@pytest.mark.parametrize("command", SHOWN)
def test_a_command_that_is_shown_names_what_is_there(command: str, dockerfile: Dockerfile) -> None:
    _check(command, dockerfile)


@pytest.mark.parametrize(
    "needed",
    [
        "docker run --rm --gpus all IMAGE diffusion-serve doctor",
        "docker run --rm --gpus '\"device=0,1\"' IMAGE diffusion-serve doctor",
        "docker run --gpus '\"device=0\"' IMAGE diffusion-serve infer"
        ' --prompt "A cat wearing a hat"',
        "docker run -p 8000:8000 --gpus all IMAGE serve run configs/sdxl.yaml",
    ],
)
def test_the_readme_shows_the_commands_that_one_starts_with(needed: str) -> None:
    text = (ROOT / "README.md").read_text()
    assert needed.replace("IMAGE", f"diffusion-serve:{__version__}-gpu") in _commands(text)


@pytest.mark.parametrize(
    ("good", "wrong"),
    [
        ("diffusion-serve infer", "diffusion-serve draw"),
        ("--prompt", "--promt"),
        ("--rm", "--remove"),
        ("configs/sdxl.yaml", "configs/sdxxl.yaml"),
        ("configs/sdxl.yaml", "configs/costs/sdxl-h100.yaml"),
        ("serve run", "serve runs"),
        ("-p 8000:8000", "-p 8000:80"),
        ("'\"device=0,1\"'", "device=0,1"),
        (__version__, "latest"),
        (f"{__version__}-gpu", f"{__version__}-cpu"),
        ("--target gpu", "--target tpu"),
        ("images/Dockerfile", "Dockerfile"),
        ("TORCH_INDEX", "TORCH_INDICES"),
        ("up demo", "up demos"),
        ("/app/image.png", "/work/image.png"),
    ],
)
def test_a_command_that_names_something_else_is_seen(
    good: str, wrong: str, dockerfile: Dockerfile
) -> None:
    touched = [command for command in SHOWN if good in command and "push" not in command]
    assert touched
    for command in touched:
        with pytest.raises(Wrong):
            _check(command.replace(good, wrong), dockerfile)


@pytest.mark.parametrize("name", COMPOSED["services"])
def test_a_service_of_compose_names_what_is_there(name: str, dockerfile: Dockerfile) -> None:
    service: dict[str, Any] = COMPOSED["services"][name]
    target = service["build"]["target"]
    assert _target(service["image"], dockerfile) == target
    context = (COMPOSE.parent / service["build"]["context"]).resolve()
    assert context == ROOT
    assert (context / service["build"]["dockerfile"]).samefile(ROOT / "images" / "Dockerfile")
    _check_program(shlex.split(service["command"]))
    (port,) = dockerfile.of(target, "EXPOSE")
    assert service["ports"] == [f"{port}:{port}"]
    (volume,) = service["volumes"]
    source, mounted = volume.split(":")
    assert source in COMPOSED["volumes"]
    assert mounted == dockerfile.environment(target)["HF_HOME"]
    healthcheck = service["healthcheck"]["test"]
    assert healthcheck[:2] == ["CMD", "wget"]
    assert healthcheck[-1] == f"http://127.0.0.1:{port}/ready"
    gpus = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    wanted = [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
    assert gpus == (wanted if target == "gpu" else [])
