"""The tables of docs/models.md, from ``models.yaml`` beside this file and from configs/."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from serve_app.config.models import ModelConfig
from serve_app.config.serve_file import read_serve_config
from serve_app.doctor.weights import Component, needed_bytes
from serve_app.protocol.params import Task
from tools.docs.markdown import table

DATA = Path(__file__).with_name("models.yaml")

_SHORT: dict[Task, str] = {
    "text-to-image": "text",
    "image-to-image": "image",
    "inpainting": "inpainting",
}

SMALLER: tuple[dict[str, str], ...] = (
    {},
    {"quantize": "int8"},
    {"offload": "model"},
    {"quantize": "int8", "offload": "model"},
)
"""Options of ``model.speed`` for which the memory is shown."""

_CONFIGS = Path(__file__).parents[2] / "configs"


@cache
def read_models() -> dict[str, Any]:
    """Return the families, the networks and the models of the file."""
    content: dict[str, Any] = yaml.safe_load(DATA.read_text())
    return content


def read_config(name: str) -> ModelConfig:
    """Return the model of a file of configs/."""
    [application] = read_serve_config(_CONFIGS / f"{name}.yaml")
    return application.model


def weights_gb(model: dict[str, Any], **speed: str) -> float:
    """Return the memory of the weights on a GPU as the doctor counts it, in 10**9 bytes."""
    networks = read_models()["networks"]
    components = [
        Component(name, networks[network], 0) for name, network in model["components"].items()
    ]
    config = read_config(model["config"])
    config = config.model_copy(update={"speed": config.speed.model_copy(update=speed)})
    return needed_bytes(components, config, on_gpu=True) / 1e9


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


def config_table() -> str:
    """Return the configs of published models with their licences and defaults, as Markdown."""
    rows = []
    for model in read_models()["models"]:
        config = read_config(model["config"])
        width, height = config.default_size_px or (0, 0)
        rows.append(
            [
                f"`{model['config']}.yaml`<br>[{config.path}](https://huggingface.co/{config.path})"
                + (" (gated)" if model.get("gated") else "")
                + f"<br>`{model['pipeline']}`",
                model["licence"],
                f"{config.default_steps}, {config.default_guidance_scale:g}",
                f"{width} x {height}",
            ]
        )
    return table(["Config, model, pipeline class", "Licence", "Steps, guidance", "Size"], rows)


def memory_table() -> str:
    """Return the weights of the configs and what they take with options, as Markdown."""
    networks = read_models()["networks"]
    rows = []
    for model in read_models()["models"]:
        parameters = sum(networks[name] for name in model["components"].values())
        rows.append(
            [
                f"`{model['config']}`<br>{parameters / 1e9:.2f} billion",
                *(f"{weights_gb(model, **speed):.1f} GB" for speed in SMALLER),
                model["smaller"],
            ]
        )
    headers = ["Config, parameters", "16 bits", "`int8`", "`offload`", "Both", "On a smaller card"]
    return table(headers, rows)


def _test_of(builder: str) -> str:
    """Return the short name of the test that runs a family, by the function that builds it."""
    module, name = builder.split(":")
    if module == "tests.edit_pipelines":
        return "edit models"
    if module != "tests.tiny_pipelines":
        return "other pipelines"
    return "certification" if name in ("pag", "animatediff") else "families"
