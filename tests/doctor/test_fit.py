"""The nodes that take a pod now, the nearest one, and the reasons against it."""

from decimal import Decimal
from typing import Any

import pytest

from serve_app.doctor.fit import Fit, Occupancy, judge, nearest
from tests.doctor.fake_cluster import on
from tests.doctor.test_placement import GPU_TAINT

GPU = "nvidia.com/gpu"
SPOT = {"key": "spot", "effect": "NoSchedule"}
CONTROL_PLANE = {"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}
POD: dict[str, Any] = {
    "nodeSelector": {"product": "L4"},
    "tolerations": [{"key": GPU, "operator": "Exists"}],
    "containers": [{"resources": {"limits": {GPU: "1", "memory": "4Gi"}}}],
}


def node(
    name: str = "n",
    *taints: dict[str, str],
    product: str = "L4",
    gpus: int = 1,
    memory: str = "8Gi",
    **spec: Any,
) -> dict[str, Any]:
    offered = {"memory": memory} | ({GPU: str(gpus)} if gpus else {})
    return {
        "metadata": {"name": name, "labels": {"product": product}},
        "spec": {"taints": [GPU_TAINT, *taints]} | spec,
        "status": {"allocatable": offered},
    }


def test_reasons_against_a_node_are_grouped_by_kind() -> None:
    [fit] = judge(POD, [node()])
    assert fit.takes
    [fit] = judge(POD, [node("far", SPOT, product="A100", gpus=0, memory="2Gi")])
    assert fit == Fit(
        "far",
        labels=("product=L4",),
        taints=(("spot", "", "NoSchedule"),),
        absent=(GPU,),
        small=("memory",),
    )
    assert not fit.takes_when_free


def test_resources_of_other_pods_are_short() -> None:
    busy = Occupancy(
        [
            on("n", "big", memory="5Gi"),
            on("n", "w", **{GPU: "1"}),
            on("other", "elsewhere", memory="9Gi"),
            on("n", "done", memory="8Gi") | {"status": {"phase": "Succeeded"}},
        ]
    )
    [fit] = judge(POD, [node()], busy)
    assert dict(fit.short) == {GPU: Decimal(1), "memory": Decimal(2**30)}
    assert fit.takes_when_free
    assert not fit.takes
    assert [one.name for one in busy.of("n", "memory")] == ["big"]


def test_a_node_takes_no_more_pods_than_its_limit() -> None:
    one = node()
    one["status"]["allocatable"]["pods"] = "2"
    [fit] = judge(POD, [one], Occupancy([on("n", "a"), on("n", "b")]))
    assert fit.short == (("pods", Decimal(1)),)


@pytest.mark.parametrize(
    ("changed", "condition"),
    [
        (node("n", unschedulable=True), ("cordoned",)),
        (
            node("n", {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}),
            ("cordoned",),
        ),
        (node("n", {"key": "node.kubernetes.io/not-ready", "effect": "NoExecute"}), ("not ready",)),
        (
            node("n", {"key": "node.kubernetes.io/disk-pressure", "effect": "NoSchedule"}),
            ("disk-pressure",),
        ),
        (
            node("n", {"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}),
            ("ToBeDeletedByClusterAutoscaler",),
        ),
    ],
)
def test_taints_of_a_nodes_state_need_no_toleration(
    changed: dict[str, Any], condition: tuple[str, ...]
) -> None:
    [fit] = judge(POD, [changed])
    assert (fit.condition, fit.taints) == (condition, ())
    assert not fit.takes_when_free


def test_a_node_whose_kubelet_is_silent_is_not_ready() -> None:
    one = node()
    one["status"]["conditions"] = [{"type": "Ready", "status": "Unknown"}]
    [fit] = judge(POD, [one])
    assert fit.condition == ("not ready",)


def test_the_nearest_node_is_the_one_that_needs_least() -> None:
    nodes = [
        node("no-gpu", gpus=0),
        node("other", product="A100"),
        node("small", memory="2Gi"),
        node("spot", SPOT),
        node("cordoned", unschedulable=True),
        node("full"),
    ]
    fits = judge(POD, nodes, Occupancy([on("full", "w", **{GPU: "1"})]))
    for number in range(len(nodes), 0, -1):
        assert [fit.node for fit in nearest(fits[:number])] == [
            nodes[number - 1]["metadata"]["name"]
        ]
    assert nearest([]) == []


def test_taints_of_different_nodes_are_not_mixed() -> None:
    nodes = [node("a", SPOT), node("b", {"key": "team", "effect": "NoSchedule"}), node("c", SPOT)]
    assert [fit.node for fit in nearest(judge(POD, nodes))] == ["a", "c"]
    two = node("a", SPOT, {"key": "team", "effect": "NoSchedule"})
    assert [fit.node for fit in nearest(judge(POD, [two, nodes[1]]))] == ["b"]


def test_a_control_plane_is_not_the_nearest_node() -> None:
    reserved = node("cp", CONTROL_PLANE)
    assert [fit.node for fit in nearest(judge(POD, [reserved, node("small", memory="2Gi")]))] == [
        "small"
    ]
