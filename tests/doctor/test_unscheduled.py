"""Pods without a node."""

from typing import Any

import pytest

from serve_app.doctor.fit import Occupancy
from serve_app.doctor.pending import why
from serve_app.doctor.report import Finding
from serve_app.doctor.unscheduled import Surroundings
from tests.doctor.fake_cluster import (
    TOLERATION,
    Object,
    event,
    node,
    on,
    service,
    unscheduled,
)
from tests.doctor.fake_gateways import condition

GPU = {"nvidia.com/gpu": "1"}
WORKER: dict[str, Any] = {
    "tolerations": [TOLERATION],
    "containers": [{"name": "w", "resources": {"limits": GPU}}],
}
READY = [condition("Ready", "True", "NonZeroServeEndpoints")]


def _why(
    stuck: Object,
    *nodes: Object,
    pods: list[Object] | None = None,
    services: tuple[Object, ...] = (),
    events: tuple[Object, ...] = (),
    readable: bool = True,
) -> Finding:
    occupancy = None if pods is None else Occupancy(pods)
    around = Surroundings(nodes if readable else None, occupancy, services)
    finding = why(stuck, events, around)
    assert finding is not None
    return finding


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ('persistentvolumeclaim "weights" not found', "Apply the claim"),
        ("pod has unbound immediate PersistentVolumeClaims.", "StorageClass does not exist"),
        ("1 node(s) had volume node affinity conflict.", "WaitForFirstConsumer"),
        ("1 node(s) exceed max volume count.", "volumes attached"),
        ("1 node(s) didn't have free ports for the requested pod ports.", "hostPort"),
        ("1 node(s) didn't match pod anti-affinity rules.", "podAntiAffinity"),
        ("1 Too many pods.", "full of pods"),
        ("something new", "By labels, taints and free resources, 1 node (gpu-1) can take it"),
    ],
)
def test_the_scheduler_decides_where_nodes_do_not_show_the_reason(
    message: str, advice: str
) -> None:
    finding = _why(unscheduled("p", message, **WORKER), node("gpu-1", gpus=1), pods=[])
    assert finding.outcome == "failed"
    assert finding.found == f"pending: {message}"
    assert advice in finding.advice


def test_a_gate_is_no_failure() -> None:
    gated = unscheduled("p", "blocked due to non-empty scheduling gates", "SchedulingGated")
    finding = _why(gated, node("gpu-1", gpus=1), pods=[])
    assert finding.outcome == "warning"
    assert "Kueue" in finding.advice


def test_words_about_other_nodes_do_not_decide() -> None:
    spot = node("spot-1", gpus=1)
    spot["spec"]["taints"] = [{"key": "spot", "effect": "NoSchedule"}]
    message = "1 node(s) had untolerated taint {spot: }, 1 Insufficient nvidia.com/gpu."
    finding = _why(
        unscheduled("p", message, **WORKER),
        spot,
        node("gpu-1", gpus=1),
        pods=[on("gpu-1", "taker", namespace="training", **GPU)],
    )
    assert finding.found == (
        "pending: 1 node fits (gpu-1), lacks 1 nvidia.com/gpu: taken by pod training/taker. The "
        f"scheduler: {message}"
    )
    assert finding.advice.startswith("All GPUs of the nodes that fit are taken.")
    assert "toleration" not in finding.advice


def test_the_autoscalers_message_is_shown() -> None:
    events = (
        event("p", "TriggeredScaleUp", "pool 1->2", minute=1, type_="Normal"),
        event("p", "NotTriggerScaleUp", "1 max node group size reached", minute=2, type_="Normal"),
    )
    finding = _why(
        unscheduled("p", "1 Insufficient nvidia.com/gpu.", **WORKER),
        node("gpu-1", gpus=1),
        pods=[on("gpu-1", "taker", **GPU)],
        events=events,
    )
    assert "autoscaler: NotTriggerScaleUp: 1 max node group size reached" in finding.found


def test_without_other_namespaces_nodes_count_as_empty_and_the_finding_states_it() -> None:
    message = "1 Insufficient nvidia.com/gpu."
    finding = _why(unscheduled("p", message, **WORKER), node("gpu-1", gpus=1))
    assert "1 node (gpu-1) would take it when empty" in finding.found
    assert "may not be read" in finding.found
    assert finding.advice.startswith("All GPUs of the nodes that fit are taken.")


def test_without_the_nodes_no_cause_is_made_up() -> None:
    message = "1 node(s) had untolerated taint {spot: }, 1 Insufficient nvidia.com/gpu."
    finding = _why(unscheduled("p", message, **WORKER), readable=False)
    assert finding.found == f"pending: {message}"
    assert "may not be read" in finding.advice
    assert "tolerations:" not in finding.advice


def _tainted(ready: bool) -> Finding:
    one = service({"conditions": READY if ready else []})
    spec = WORKER | {"tolerations": []}
    return _why(
        unscheduled("p", "1 node(s) had untolerated taint", ray_cluster="sdxl-abc", **spec),
        node("gpu-1", gpus=1),
        pods=[],
        services=(one,),
    )


def test_deleting_a_service_is_the_last_advice_and_only_if_it_is_not_ready() -> None:
    for ready in (True, False):
        assert _tainted(ready).advice.startswith("Add to the pod template:\n  tolerations:")
    assert "delete" not in _tainted(ready=True).advice
    assert "delete" in _tainted(ready=False).advice.splitlines()[-1]


def test_a_taint_beside_a_lasting_reason_is_not_advised_on() -> None:
    spec = WORKER | {"tolerations": [], "nodeSelector": {"pool": "gpu"}}
    finding = _why(unscheduled("p", "no", **spec), node("gpu-1", gpus=1), pods=[])
    assert "it does not tolerate nvidia.com/gpu=present:NoSchedule (gpu-1)" in finding.found
    assert "tolerations:" not in finding.advice


def test_nodes_short_of_different_amounts_are_summed_up() -> None:
    spec = WORKER | {"containers": [{"name": "w", "resources": {"limits": {"nvidia.com/gpu": 2}}}]}
    finding = _why(
        unscheduled("p", "no", **spec),
        *(node(name, gpus=2) for name in ("a", "b", "c", "d")),
        pods=[
            on(name, f"of-{name}", **{"nvidia.com/gpu": number})
            for name, number in {"a": "1", "b": "2", "c": "2", "d": "2"}.items()
        ],
    )
    assert finding.found.startswith(
        "pending: 4 nodes fit (a, b, c and 1 more), each lacks 1 to 2 nvidia.com/gpu: taken by "
        "pods of-a, of-b, of-c and 1 more. The scheduler: no"
    )


def test_no_nodes_at_all() -> None:
    assert "there are no nodes" in _why(unscheduled("p", "no nodes available"), pods=[]).found
