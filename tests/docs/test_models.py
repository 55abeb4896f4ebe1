"""docs/models.md calls tested what tests prove, and its sizes are those of the counted networks."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import DiffusionPipeline

from serve_app.engine.model.tasks import pipelines_by_task
from tests import edit_pipelines, more_pipelines, tiny_pipelines
from tests.test_full_size import PUBLISHED
from tools.docs.models import family_table, model_table, read_models

ROOT = Path(__file__).parents[2]
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


def test_counted_sizes_are_the_sums_of_the_networks() -> None:
    for model in read_models()["models"]:
        if "networks" in model:
            counted = sum(PUBLISHED[name][1] for name in model["networks"]) / 1e9
            assert model["billion_parameters"] == pytest.approx(counted, rel=0.005), model


def test_configs_serve_the_model_of_their_row() -> None:
    for model in read_models()["models"]:
        if "config" in model:
            [application] = yaml.safe_load((ROOT / model["config"]).read_text())["applications"]
            assert application["args"]["model"]["path"] == model["repository"]


def test_the_tables_are_markdown_with_every_row() -> None:
    for table, rows in ((family_table(), "families"), (model_table(), "models")):
        lines = table.splitlines()
        assert len(lines) == 2 + len(read_models()[rows])
        assert len({line.count("|") for line in lines}) == 1
