"""The container commands that the pages, images/README.md and compose.yaml show can be run."""

import re
import shlex
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from serve_app import __version__
from serve_app.cli import cli
from serve_app.config.serve_file import read_serve_config
from tests.pages import CONTAINERS, KUBERNETES, OWN_OVERLAY

ROOT = Path(__file__).parents[2]
DOCUMENTS = (CONTAINERS, KUBERNETES, OWN_OVERLAY, "docs/operate/keys.md", "images/README.md")
COMPOSE = ROOT / "images" / "compose.yaml"
COMPOSED = yaml.safe_load(COMPOSE.read_text())
IMAGE = re.compile(r"\S*?diffusion-serve:(\S+)-(cpu|gpu)")


def _commands(text: str) -> list[str]:
    """Return docker's commands in blocks of shell code; a backslash joins lines."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("docker ")]


SHOWN = [command for name in DOCUMENTS for command in _commands((ROOT / name).read_text())]


def _check_program(words: list[str]) -> None:
    """Let the real program parse its arguments without running it."""
    program, command, *arguments = words
    programs: dict[str, Any] = {
        "diffusion-serve": get_command(cli),
        "serve": import_module("ray.serve.scripts").cli,
    }
    programs[program].commands[command].make_context(command, [*arguments])
    for config in (word for word in arguments if word.endswith(".yaml")):
        assert config.startswith("configs/"), "only these files are in the images"
        assert read_serve_config(ROOT / config)


@pytest.mark.parametrize("command", SHOWN)
def test_a_shown_command_names_images_programs_and_arguments_that_exist(command: str) -> None:
    words = shlex.split(command)
    for word in words:
        if image := IMAGE.fullmatch(word):
            assert image[1] == __version__
    options = list(pairwise(words))
    texts = [(ROOT / value).read_text() for option, value in options if option == "-f"]
    for option, value in options:
        if option == "--target":
            assert f" AS {value}\n" in texts[0]
        if option == "--build-arg":
            assert f"\nARG {value.partition('=')[0]}" in texts[0]
    if words[1] == "run":
        [position] = [at for at, word in enumerate(words) if IMAGE.fullmatch(word)]
        _check_program(words[position + 1 :])


def test_documents_show_commands() -> None:
    assert len(SHOWN) > 5


@pytest.mark.parametrize("name", COMPOSED["services"])
def test_a_service_of_compose_refers_to_existing_parts(name: str) -> None:
    service: dict[str, Any] = COMPOSED["services"][name]
    image = IMAGE.fullmatch(service["image"])
    assert image
    assert image.groups() == (__version__, service["build"]["target"])
    context = (COMPOSE.parent / service["build"]["context"]).resolve()
    assert (context / service["build"]["dockerfile"]).samefile(ROOT / "images" / "Dockerfile")
    _check_program(shlex.split(service["command"]))
    assert service["ports"] == ["8000:8000"]
    assert service["healthcheck"]["test"][-1] == "http://127.0.0.1:8000/ready"
    [volume] = service["volumes"]
    assert volume == "huggingface:/cache/huggingface"
