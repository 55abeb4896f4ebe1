"""The chain of deadlines of a RayService, offline."""

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.doctor.deadlines import as_text, chains, misorders
from serve_app.errors import ConfigError
from tests.cluster.manifests import render

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted(path.name for path in (ROOT / "cluster/overlays").iterdir())
Object = dict[str, Any]


@cache
def _rendered(overlay: str) -> Object:
    return render(ROOT / "cluster/overlays" / overlay).service


def _service(overlay: str = "production") -> Object:
    return deepcopy(_rendered(overlay))


def _group(service: Object) -> Object:
    group: Object = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    return group


def _configured(service: Object, **args: Object) -> Object:
    content = yaml.safe_load(service["spec"]["serveConfigV2"])
    content["applications"][0]["args"] |= args
    service["spec"]["serveConfigV2"] = yaml.safe_dump(content)
    return service


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_ends_in_order(overlay: str) -> None:
    """Read the chains with `pytest -s`."""
    service = _service(overlay)
    for chain in chains(service):
        print(f"\n{overlay}: {as_text(chain)}", end="")
    assert list(misorders(service)) == []


def test_a_request_through_a_gateway_is_the_longest() -> None:
    generator, gateway, head = chains(_service())
    assert [link.seconds for link in generator] == [120, 130, 450, 480, 600]
    assert [link.seconds for link in gateway] == [420, 430, 450, 480, 600]
    assert [link.seconds for link in head] == [30, 60]
    assert as_text(gateway) == (
        "the longest request (max_hold_s and max_deadline_s) 420 < graceful_shutdown_timeout_s of "
        "Gateway 430 <= RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S of workerGroupSpecs[gpu] 450 < "
        "terminationGracePeriodSeconds of workerGroupSpecs[gpu] 480 < the deletion delay 600"
    )


def test_a_group_without_gateways_waits_for_generators_only() -> None:
    seconds = [[link.seconds for link in chain] for chain in chains(_service("spot"))]
    assert seconds == [
        [120, 130, 450, 480, 600],
        [120, 130, 150, 180, 600],
        [420, 430, 450, 480, 600],
        [30, 60],
    ]


def test_a_drain_may_be_as_long_as_a_replicas_grace() -> None:
    service = _configured(_service(), gateway={"max_hold_s": 320})
    assert [chain[1].seconds for chain in chains(service)][1] == 450
    assert list(misorders(service)) == []


@pytest.mark.parametrize("delay_s", [None, 60, 480])
def test_a_cluster_that_is_deleted_before_its_pods_end_is_found(delay_s: int | None) -> None:
    service = _service()
    service["spec"]["rayClusterDeletionDelaySeconds"] = delay_s
    [misorder] = misorders(service)
    assert misorder.link.field == "spec.rayClusterDeletionDelaySeconds"
    assert misorder.found == (
        f"is {delay_s or 60}, not over terminationGracePeriodSeconds of workerGroupSpecs[gpu], 480"
    )
    assert "Set rayClusterDeletionDelaySeconds" in misorder.link.advice


def test_a_longer_request_names_the_broken_link() -> None:
    service = _configured(_service(), gateway={"max_hold_s": 900})
    [misorder] = misorders(service)
    assert misorder.link.field.endswith("env.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
    assert misorder.found == "is 450, less than graceful_shutdown_timeout_s of Gateway, 1030"


def test_defaults_of_ray_and_kubernetes_count() -> None:
    service = _service()
    pod = _group(service)["template"]["spec"]
    del pod["terminationGracePeriodSeconds"], pod["containers"][0]["env"]
    found = {misorder.found.partition(",")[0] for misorder in misorders(service)}
    assert found == {"is 30"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("", "no application with import_path"),
        ("{", "is not YAML"),
        ("applications: [{import_path: 'other:build'}]", "no application with import_path"),
        (
            "applications: [{import_path: 'serve_app.app:build', args: {gatway: {}}}]",
            "gatway: unknown key",
        ),
    ],
)
def test_a_wrong_serve_config_is_a_mistake(config: str, words: str) -> None:
    service = _service()
    service["spec"]["serveConfigV2"] = config
    with pytest.raises(ConfigError, match=words):
        chains(service)


def test_a_duration_that_is_no_number_is_a_mistake() -> None:
    service = _service()
    _group(service)["template"]["spec"]["terminationGracePeriodSeconds"] = "8m"
    with pytest.raises(ConfigError, match=r"terminationGracePeriodSeconds is '8m'"):
        chains(service)
