"""The tables of docs/models.md, from ``models.yaml`` beside this file."""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

import yaml

from serve_app.protocol.params import Task

DATA = Path(__file__).with_name("models.yaml")

BYTES = 2
"""Bytes of a parameter in bfloat16 and float16."""


@cache
def read_models() -> dict[str, list[dict[str, Any]]]:
    """Return the families and the models of the file."""
    content: dict[str, list[dict[str, Any]]] = yaml.safe_load(DATA.read_text())
    return content


def family_table() -> str:
    """Return the families, their tasks and how their requests share the model, as Markdown."""
    tasks: tuple[Task, ...] = get_args(Task)
    rows = (
        [
            f"{family['name']}<br>`{family['pipeline']}`",
            *("yes" if task in family["tasks"] else "no" for task in tasks),
            f"{family['sharing']}{_note(family)}",
            f"`{_test_of(family['builder'])}`",
        ]
        for family in read_models()["families"]
    )
    header = ["Family and pipeline class", *(task.capitalize() for task in tasks)]
    return _table([*header, "Requests are", "Tested by"], rows)


def model_table() -> str:
    """Return published models, the memory of their weights and their licences, as Markdown."""
    rows = (
        [
            f"[`{model['repository']}`](https://huggingface.co/{model['repository']})"
            + (" (gated)" if model.get("gated") else ""),
            f"{model['billion_parameters']:g} billion",
            f"{model['billion_parameters'] * BYTES:.1f} GB",
            "counted" if "networks" in model else "published size",
            model["licence"],
            f"`{model['config']}`" if "config" in model else "",
        ]
        for model in read_models()["models"]
    )
    header = ["Repository", "Parameters", "Weights at 16 bits", "Source", "Licence", "Config here"]
    return _table(header, rows)


def _note(family: dict[str, Any]) -> str:
    return f"<br>{family['note']}" if "note" in family else ""


def _test_of(builder: str) -> str:
    """Return the file of the test that runs a family, by the function that builds it."""
    module, name = builder.split(":")
    if module != "tests.tiny_pipelines":
        return f"{module.replace('.', '/')}.py"
    special = name in ("pag", "animatediff")
    return f"tests/engine/{'startup/test_certification' if special else 'test_families'}.py"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
