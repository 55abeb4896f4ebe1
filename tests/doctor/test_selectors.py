"""Label selectors of deployments against the labels of worker groups."""

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.deployments.gateway import Gateway
from serve_app.deployments.generator import Generator
from serve_app.doctor.deadlines import chains
from serve_app.doctor.manifest import look
from serve_app.doctor.selectors import NO_GATEWAY, placed, selects
from tests.cluster.manifests import render

ROOT = Path(__file__).parents[2]
Object = dict[str, Any]
LARGE = {"diffusion-serve/gpu": "large"}


@cache
def _rendered(overlay: str) -> Object:
    return render(ROOT / "cluster/overlays" / overlay).service


def _service(overlay: str = "several-models", **actor_options: object) -> Object:
    """Return the RayService; ``actor_options`` are those of its first deployment."""
    service = deepcopy(_rendered(overlay))
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    config["applications"][0]["deployments"][0]["ray_actor_options"] |= actor_options
    service["spec"]["serveConfigV2"] = yaml.safe_dump(config)
    return service


def _groups(service: Object) -> dict[str, list[str]]:
    return {
        one.deployment: [path.rpartition(".")[2] for path in one.groups] for one in placed(service)
    }


@pytest.mark.parametrize(
    ("selector", "matches"),
    [
        ("large", True),
        ("small", False),
        ("!small", True),
        ("!large", False),
        ("in(small, large)", True),
        ("in(small,medium)", False),
        ("!in(small, large)", False),
        ("!in(small, medium)", True),
    ],
)
def test_a_selector_matches_as_ray_has_it(selector: str, matches: bool) -> None:
    name = "diffusion-serve/gpu"
    assert selects({name: selector}, LARGE) == matches
    assert selects({name: selector}, {}) == selector.startswith("!")
    assert not selects({name: selector, "other": "x"}, LARGE)


def test_each_model_has_the_group_that_its_label_names() -> None:
    assert _groups(_service()) == {
        "Generator-sdxl": ["workerGroupSpecs[gpu]"],
        "Generator-z-image-turbo": ["workerGroupSpecs[gpu-large]"],
        "Gateway": ["workerGroupSpecs[gateway]"],
    }


def test_without_a_selector_all_groups_with_gpus_take_replicas() -> None:
    assert _groups(_service("spot")) == {
        "Generator": ["workerGroupSpecs[gpu]", "workerGroupSpecs[gpu-spot]"],
        "Gateway": ["workerGroupSpecs[gpu]"],
    }
    on_cpu = _groups(_service(num_gpus=0, label_selector={}))["Generator-sdxl"]
    assert on_cpu == [f"workerGroupSpecs[{name}]" for name in ("gpu", "gpu-large", "gateway")]


def test_the_options_of_the_code_count_where_the_config_has_none() -> None:
    service = _service()
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    del config["applications"][0]["deployments"]
    service["spec"]["serveConfigV2"] = yaml.safe_dump(config)
    assert _groups(service)["Generator-sdxl"] == [
        "workerGroupSpecs[gpu]",
        "workerGroupSpecs[gpu-large]",
    ]
    by_code = {one.deployment: one for one in placed(service)}
    for deployment, name in ((Generator, "Generator-sdxl"), (Gateway, "Gateway")):
        options = deployment.ray_actor_options  # type: ignore[attr-defined]
        assert by_code[name].selector == options.get("label_selector", {})
        assert by_code[name].needs_gpu == bool(options.get("num_gpus"))
    assert not selects(by_code["Gateway"].selector, NO_GATEWAY)


def test_a_model_that_no_group_takes_is_a_row() -> None:
    found = {one.check: one for one in look([_service(label_selector={"x": "y"} | LARGE)])}
    row = found["diffusion-serve replicas of Generator-sdxl"]
    assert row.outcome == "failed"
    assert row.found.startswith(
        "no group of pods has diffusion-serve/gpu: large and x: y and a GPU"
    )
    assert "diffusion-serve replicas" not in found
    found = {one.check: one for one in look([_service()])}
    assert found["diffusion-serve replicas"].found == (
        "Generator-sdxl in gpu; Generator-z-image-turbo in gpu-large; Gateway in gateway"
    )


def test_deadlines_of_a_model_are_those_of_its_groups() -> None:
    """The drain of another group's nodes cuts off nothing of it."""
    service = _service()
    [_, large, _] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    large["template"]["spec"]["terminationGracePeriodSeconds"] = 500
    graces_s = [[link.seconds for link in chain][3:4] for chain in chains(service)]
    assert graces_s == [[480], [500], [480], []]
