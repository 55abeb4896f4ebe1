"""The scheduler's filters: the nodes that take a pod."""

from decimal import Decimal
from typing import Any

import pytest

from serve_app.doctor.placement import gpus, groups, requests, unmet, untolerated


def node(
    labels: dict[str, str] | None = None,
    taints: list[dict[str, str]] | None = None,
    **allocatable: str,
) -> dict[str, Any]:
    offered = {
        name.replace("__", "/").replace("_", "."): amount for name, amount in allocatable.items()
    }
    return {
        "metadata": {"name": "n", "labels": labels or {}},
        "spec": {"taints": taints or []},
        "status": {"allocatable": offered},
    }


def selecting(*terms: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [{"matchExpressions": term} for term in terms]
                }
            }
        }
    }


LABELS = {"product": "L4", "major": "580"}


@pytest.mark.parametrize(
    ("operator", "key", "values", "met"),
    [
        ("In", "product", ["L4", "A100"], True),
        ("In", "product", ["A100"], False),
        ("In", "other", ["L4"], False),
        ("NotIn", "product", ["A100"], True),
        ("NotIn", "product", ["L4"], False),
        ("NotIn", "other", ["L4"], True),
        ("Exists", "product", None, True),
        ("Exists", "other", None, False),
        ("DoesNotExist", "other", None, True),
        ("DoesNotExist", "product", None, False),
        ("Gt", "major", ["579"], True),
        ("Gt", "major", ["580"], False),
        ("Lt", "major", ["581"], True),
        ("Lt", "major", ["580"], False),
        ("Gt", "product", ["1"], False),
        ("Gt", "other", ["1"], False),
        ("Odd", "product", ["L4"], False),
    ],
)
def test_affinity_is_read_as_the_scheduler_does(
    operator: str, key: str, values: list[str] | None, met: bool
) -> None:
    expression = {"key": key, "operator": operator} | ({"values": values} if values else {})
    assert (unmet(selecting([expression]), node(LABELS)) == []) == met


def test_one_term_is_enough_and_the_nearest_is_named() -> None:
    met = {"key": "product", "operator": "Exists"}
    other = {"key": "other", "operator": "Exists"}
    wrong = {"key": "product", "operator": "In", "values": ["A100", "H100"]}
    assert unmet(selecting([other], [met]), node(LABELS)) == []
    assert unmet(selecting([other, wrong], [met, wrong]), node(LABELS)) == ["product In A100,H100"]
    both = selecting([other]) | {"nodeSelector": {"product": "T4"}}
    assert unmet(both, node(LABELS)) == ["product=T4", "other Exists"]
    assert unmet({}, node()) == []


GPU_TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}


@pytest.mark.parametrize(
    ("toleration", "tolerated"),
    [
        ({"key": "nvidia.com/gpu", "operator": "Exists"}, True),
        ({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}, True),
        ({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute"}, False),
        ({"key": "nvidia.com/gpu", "operator": "Equal", "value": "present"}, True),
        ({"key": "nvidia.com/gpu", "value": "present"}, True),
        ({"key": "nvidia.com/gpu"}, False),  # Equal to nothing
        ({"key": "ray.io/node-type", "operator": "Exists"}, False),
        ({"operator": "Exists"}, True),
        ({"operator": "Equal"}, False),
    ],
)
def test_taints_are_tolerated_as_the_scheduler_does(
    toleration: dict[str, str], tolerated: bool
) -> None:
    assert (untolerated({"tolerations": [toleration]}, node(taints=[GPU_TAINT])) == []) == tolerated


def test_a_preference_excludes_no_node() -> None:
    assert untolerated({}, node(taints=[GPU_TAINT | {"effect": "PreferNoSchedule"}])) == []
    assert untolerated({}, node(taints=[GPU_TAINT | {"effect": "NoExecute"}])) != []


def test_requests_of_a_pod_are_summed() -> None:
    pod = {
        "containers": [
            {"resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": "4"}}},
            {"resources": {"limits": {"cpu": 1, "nvidia.com/gpu": 1}}},
            {},
        ],
        "initContainers": [{"resources": {"requests": {"cpu": "1", "memory": "3Gi"}}}],
    }
    wanted = requests(pod)
    assert wanted == {
        "cpu": Decimal("1.5"),
        "memory": Decimal(3 * 2**30),
        "nvidia.com/gpu": Decimal(1),
    }


def test_sidecars_and_overhead_count_as_requests() -> None:
    def asking(cpu: str, **more: str) -> dict[str, Any]:
        return {"resources": {"requests": {"cpu": cpu}}} | more

    pod = {
        "initContainers": [asking("1", restartPolicy="Always"), asking("4")],
        "containers": [asking("2")],
    }
    assert requests(pod) == {"cpu": Decimal(5)}  # the second one beside the sidecar
    pod["containers"] = [asking("6")]
    assert requests(pod | {"overhead": {"cpu": "250m"}}) == {"cpu": Decimal("7.25")}


def test_gpus_and_their_parts_are_counted() -> None:
    offered = {"nvidia.com/gpu": "8", "nvidia.com/mig-1g.10gb": "2", "nvidia.com/mig-2g.20gb": "0"}
    assert gpus({"status": {"allocatable": offered | {"cpu": "4"}}}) == {
        "nvidia.com/gpu": 8,
        "nvidia.com/mig-1g.10gb": 2,
    }
    assert gpus({}) == {}


def test_groups_of_a_service() -> None:
    service = {
        "metadata": {"name": "ds"},
        "spec": {
            "rayClusterConfig": {
                "headGroupSpec": {"template": {"spec": {"containers": []}}},
                "workerGroupSpecs": [
                    {"groupName": "gpu", "minReplicas": 0, "template": {"spec": {}}},
                    {"groupName": "floor", "minReplicas": 1, "template": {"spec": {}}},
                    {
                        "groupName": "first",
                        "minReplicas": 0,
                        "replicas": 2,
                        "template": {"spec": {}},
                    },
                ],
            }
        },
    }
    assert [(group.name, group.may_be_empty) for group in groups(service)] == [
        ("ds head", False),
        ("ds gpu", True),
        ("ds floor", False),
        ("ds first", False),
    ]
