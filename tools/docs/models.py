"""The tables of docs/models.md, from ``models.yaml`` beside this file."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from serve_app.protocol.params import Task
from tools.docs.markdown import table

DATA = Path(__file__).with_name("models.yaml")

_SHORT: dict[Task, str] = {
    "text-to-image": "text",
    "image-to-image": "image",
    "inpainting": "inpainting",
}

BYTES = 2
"""Bytes of a parameter in bfloat16 and float16."""


@cache
def read_models() -> dict[str, list[dict[str, Any]]]:
    """Return the families and the models of the file."""
    content: dict[str, list[dict[str, Any]]] = yaml.safe_load(DATA.read_text())
    return content


def family_table() -> str:
    """Return the families, their tasks and how their requests share the model, as Markdown."""
    rows = (
        [
            f"{family['name']}<br>`{family['pipeline']}`",
            ", ".join(_SHORT[task] for task in family["tasks"]),
            family["sharing"],
            _test_of(family["builder"]),
        ]
        for family in read_models()["families"]
    )
    return table(["Family and pipeline class", "Tasks", "Requests are", "Tested in"], rows)


def model_table() -> str:
    """Return published models, the memory of their weights and their licences, as Markdown."""
    rows = (
        [
            f"[{model['repository']}](https://huggingface.co/{model['repository']})"
            + (" (gated)" if model.get("gated") else ""),
            f"{model['billion_parameters']:g} billion, "
            + ("counted" if "networks" in model else "published size"),
            f"{model['billion_parameters'] * BYTES:.1f} GB",
            model["licence"],
        ]
        for model in read_models()["models"]
    )
    return table(["Repository", "Parameters", "Weights at 16 bits", "Licence"], rows)


def _test_of(builder: str) -> str:
    """Return the short name of the test that runs a family, by the function that builds it."""
    module, name = builder.split(":")
    if module == "tests.edit_pipelines":
        return "edit models"
    if module != "tests.tiny_pipelines":
        return "other pipelines"
    return "certification" if name in ("pag", "animatediff") else "families"
