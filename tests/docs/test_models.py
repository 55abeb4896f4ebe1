"""docs/models.md calls tested what tests prove, and its sizes are those of the counted networks."""

from importlib import import_module
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from torch import nn

from serve_app.engine.model.tasks import pipelines_by_task
from tests import edit_pipelines, more_pipelines, tiny_pipelines
from tests.serve_configs import FOLDER, SERVE_CONFIGS
from tests.test_full_size import COUNTED, PUBLISHED
from tests.test_model_configs import TWINS
from tools.docs.models import (
    config_table,
    family_table,
    memory_table,
    read_config,
    read_models,
    weights_gb,
)

SPECIAL = {"pag": "sequential", "animatediff": "batched"}
"""Builders that `tests.engine.startup.test_certification` runs, with what it asserts."""


def _family(entry: dict[str, Any]) -> DiffusionPipeline:
    module, name = entry["builder"].split(":")
    pipeline: DiffusionPipeline = getattr(import_module(module), name)()
    return pipeline


def test_the_table_lists_exactly_the_tested_families() -> None:
    """Other tests assert that each is certified like this: families and certified ones batch."""
    batched = {one.__name__ for one in tiny_pipelines.FAMILIES.values()}
    for pipelines in (more_pipelines.CERTIFIED, edit_pipelines.EDITS):
        batched |= {build.__name__ for build, *_ in pipelines.values()}
    proven = dict.fromkeys(batched, "batched") | SPECIAL
    listed = {one["builder"].split(":")[1]: one["sharing"] for one in read_models()["families"]}
    assert listed == proven


@pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning")
@pytest.mark.parametrize("entry", read_models()["families"], ids=lambda entry: entry["pipeline"])
def test_pipeline_and_tasks_are_those_of_the_tested_model(entry: dict[str, Any]) -> None:
    pipeline = _family(entry)
    assert type(pipeline).__name__ == entry["pipeline"]
    tasks = list(pipelines_by_task(pipeline))
    if "text-to-image" not in entry["tasks"]:  # which the start finds out
        tasks.remove("text-to-image")
    assert tasks == entry["tasks"]


def test_the_sizes_are_those_of_the_counted_networks() -> None:
    counted = {name: weights for name, (_, weights) in (PUBLISHED | COUNTED).items()}
    assert read_models()["networks"] == counted
    used = {name for model in read_models()["models"] for name in model["components"].values()}
    assert used == counted.keys()


def test_every_config_of_a_published_model_has_a_row_and_a_twin() -> None:
    names = [model["config"] for model in read_models()["models"]]
    assert {*names, "demo", "several-models"} == {path.stem for path in SERVE_CONFIGS}
    assert names == list(TWINS)


@pytest.mark.parametrize("model", read_models()["models"], ids=lambda model: model["config"])
def test_a_row_names_the_pipeline_class_and_the_networks_of_its_twin(model: dict[str, Any]) -> None:
    twin = TWINS[model["config"]].build()
    assert type(twin).__name__ == model["pipeline"]
    networks = {name for name, part in twin.components.items() if isinstance(part, nn.Module)}
    assert networks == model["components"].keys()


@pytest.mark.parametrize("model", read_models()["models"], ids=lambda model: model["config"])
def test_a_config_sets_all_that_its_row_shows(model: dict[str, Any]) -> None:
    config = read_config(model["config"])
    assert config.path is not None
    assert None not in (config.default_steps, config.default_guidance_scale, config.default_size_px)
    text = (FOLDER / f"{model['config']}.yaml").read_text()
    assert ("HF_TOKEN" in text) == model.get("gated", False)


def test_the_memory_is_that_of_the_weights_in_16_bits() -> None:
    for model in read_models()["models"]:
        networks = [read_models()["networks"][name] for name in model["components"].values()]
        assert weights_gb(model) == pytest.approx(2 * sum(networks) / 1e9)
        assert weights_gb(model, offload="model", quantize="int8") < weights_gb(model)


def test_the_tables_are_markdown_with_every_row() -> None:
    tables = ((family_table, "families"), (config_table, "models"), (memory_table, "models"))
    for table, rows in tables:
        lines = table().splitlines()
        assert len(lines) == 2 + len(read_models()[rows])
        assert len({line.count("|") for line in lines}) == 1
