"""The checks of GPU nodes, and of the places of pods on them."""

from pathlib import Path

import pytest

from tests.doctor.cluster_checks import findings_of
from tests.doctor.fake_cluster import (
    FakeApi,
    Object,
    node,
    plugin,
    service,
    workload,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("plugins", "outcome", "found", "advice"),
    [
        ([plugin(2, 1)], "failed", "ready on 1 of 2 nodes", "no driver"),
        ([plugin(0, 0)], "warning", "ready on 0 of 0 nodes", "selects no node"),
        ([], "warning", "though nodes offer GPUs", "Some providers"),
        (
            [plugin(name="nvdp-nvidia-device-plugin-gpu-feature-discovery")],
            "warning",
            "no daemonset",
            "Some providers",
        ),
        ([plugin(name="nvidia-device-plugin-daemonset")], "ok", "ready on 1 of 1", ""),
    ],
)
def test_the_device_plugin_must_be_ready(
    api: FakeApi, kubeconfig: Path, plugins: list[Object], outcome: str, found: str, advice: str
) -> None:
    api.put("daemonsets.apps", workload("logs", "fluent-bit:4", plugin()["status"]), *plugins)
    finding = findings_of(kubeconfig)["device plugin"]
    assert finding.outcome == outcome
    assert found in finding.found
    assert advice in finding.advice


def test_a_cluster_without_gpus_fails_unless_none_is_expected(
    api: FakeApi, kubeconfig: Path
) -> None:
    api.put("daemonsets.apps")
    api.put("nodes", node("cpu-1"))
    findings = findings_of(kubeconfig)
    assert findings["device plugin"].outcome == "failed"
    assert "cluster/platform" in findings["device plugin"].advice
    assert findings["GPU nodes"].found == "none of 1 offers nvidia.com/gpu"
    api.put("rayservices.ray.io", service(pod={"nodeSelector": {}, "containers": [{"name": "w"}]}))
    without = findings_of(kubeconfig, cpu=True)
    assert {finding.outcome for finding in without.values()} == {"ok"}
    assert not without.keys() & {"device plugin", "GPU nodes"}


def test_no_gpu_node_is_as_it_should_be_while_the_groups_are_empty(
    api: FakeApi, kubeconfig: Path
) -> None:
    api.put("daemonsets.apps", plugin(0, 0))
    api.put("nodes", node("cpu-1"))
    api.put("rayservices.ray.io", service(minReplicas=0))
    findings = findings_of(kubeconfig)
    assert findings["GPU nodes"].outcome == "warning"
    assert "autoscaler adds nodes" in findings["GPU nodes"].advice
    assert "failed" not in {finding.outcome for finding in findings.values()}
    two_groups = service(minReplicas=0)
    workers = two_groups["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    workers.append(workers[0] | {"groupName": "on-demand", "minReplicas": 1})
    api.put("rayservices.ray.io", two_groups)
    assert findings_of(kubeconfig)["GPU nodes"].outcome == "failed"


def test_gpus_without_allocatable_devices_fail(api: FakeApi, kubeconfig: Path) -> None:
    seen = {"nvidia.com/gpu.present": "true"}
    api.put("nodes", node("sick", capacity=4), node("unplugged", **seen))
    finding = findings_of(kubeconfig)["GPU nodes"]
    assert finding.outcome == "failed"
    assert finding.found.startswith("sick, unplugged: GPUs are present")


def test_parts_of_gpus_count_as_gpus(api: FakeApi, kubeconfig: Path) -> None:
    split = node("mig-1", **{"nvidia.com/gpu.product": "NVIDIA-A100"})
    split["status"]["allocatable"]["nvidia.com/mig-3g.20gb"] = "2"
    api.put("nodes", split)
    finding = findings_of(kubeconfig)["GPU nodes"]
    assert finding.found == "1 with 2 nvidia.com/mig-3g.20gb (NVIDIA-A100)"


@pytest.mark.parametrize(
    "label",
    [
        {"nvidia.com/gpu.sharing-strategy": "time-slicing"},
        {"nvidia.com/gpu.sharing-strategy": "mps"},
        {"nvidia.com/gpu.replicas": "4"},
    ],
)
def test_shared_gpus_are_warnings(api: FakeApi, kubeconfig: Path, label: dict[str, str]) -> None:
    alone = {"nvidia.com/gpu.sharing-strategy": "none", "nvidia.com/gpu.replicas": "1"}
    api.put("nodes", node("gpu-1", gpus=4, **label), node("gpu-2", gpus=1, **alone))
    finding = findings_of(kubeconfig)["GPU sharing"]
    assert finding.outcome == "warning"
    assert finding.found.startswith("gpu-1: ")


def test_nodes_without_labels_of_feature_discovery_are_warnings(
    api: FakeApi, kubeconfig: Path
) -> None:
    bare = node("gpu-1", gpus=1)
    del bare["metadata"]["labels"]["nvidia.com/gpu.product"]
    api.put("nodes", bare)
    findings = findings_of(kubeconfig)
    assert findings["GPU nodes"].outcome == "warning"
    assert "gfd.enabled=true" in findings["GPU nodes"].advice
    assert findings["sdxl gpu"].found == "no node has nvidia.com/gpu.product=NVIDIA-L4"
    assert "gfd.enabled=true" in findings["sdxl gpu"].advice


# Whether pods find a place.


def test_a_missing_toleration_is_written_out(api: FakeApi, kubeconfig: Path) -> None:
    api.put("rayservices.ray.io", service(pod={"tolerations": []}))
    finding = findings_of(kubeconfig)["sdxl gpu"]
    assert finding.outcome == "failed"
    assert "it does not tolerate nvidia.com/gpu=present:NoSchedule" in finding.found
    assert finding.advice == (
        "Add to the pod template:\n  tolerations:\n"
        "  - {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}"
    )


def test_a_missing_toleration_is_found_without_a_node_selector(
    api: FakeApi, kubeconfig: Path
) -> None:
    """As in KubeRay's own samples: nodes without a GPU are too small, and that is not the fault."""
    api.put("rayservices.ray.io", service(pod={"tolerations": [], "nodeSelector": {}}))
    finding = findings_of(kubeconfig)["sdxl gpu"]
    assert finding.found == "it does not tolerate nvidia.com/gpu=present:NoSchedule (gpu-1)"


def test_all_causes_are_reported_together(api: FakeApi, kubeconfig: Path) -> None:
    api.put("nodes", node("gpu-1", gpus=1))
    limits = {"nvidia.com/gpu": 4}
    container = {"name": "w", "resources": {"limits": limits}}
    wrong = {"tolerations": [], "nodeSelector": {"pool": "gpu"}, "containers": [container]}
    api.put("rayservices.ray.io", service(pod=wrong))
    finding = findings_of(kubeconfig)["sdxl gpu"]
    assert finding.found == (
        "no node has pool=gpu; it does not tolerate nvidia.com/gpu=present:NoSchedule (gpu-1); its "
        "pods request more than gpu-1 has: nvidia.com/gpu 4 (it has 1)"
    )
    assert "tolerations:" not in finding.advice  # they alone would change nothing


def test_a_cordoned_node_is_no_matter_of_tolerations(api: FakeApi, kubeconfig: Path) -> None:
    cordoned = node("gpu-1", gpus=1)
    cordoned["spec"]["taints"].append(
        {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}
    )
    api.put("nodes", node("cpu-1"), cordoned)
    finding = findings_of(kubeconfig)["sdxl gpu"]
    assert finding.found == "1 node fits (gpu-1), but is cordoned"
    assert "kubectl uncordon gpu-1" in finding.advice


def test_another_gpu_than_the_one_selected_is_reported(api: FakeApi, kubeconfig: Path) -> None:
    api.put("nodes", node("a", gpus=1, **{"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}))
    finding = findings_of(kubeconfig)["sdxl gpu"]
    assert finding.outcome == "failed"
    assert "Nodes here have NVIDIA-H100-80GB-HBM3" in finding.advice


def test_labels_of_other_nodes_are_named(api: FakeApi, kubeconfig: Path) -> None:
    api.put("rayservices.ray.io", service(pod={"nodeSelector": {"pool": "gpu"}}))
    finding = findings_of(kubeconfig)["sdxl gpu"]
    assert finding.found == "no node has pool=gpu"
    assert "Add a node with these labels" in finding.advice
    api.put("nodes")
    assert findings_of(kubeconfig)["sdxl gpu"].found == "there are no nodes"


def test_a_pod_that_is_larger_than_any_node_is_reported(api: FakeApi, kubeconfig: Path) -> None:
    limits = {"nvidia.com/gpu": 2, "memory": "30Gi", "cpu": 16}
    api.put(
        "rayservices.ray.io",
        service(pod={"containers": [{"name": "w", "resources": {"limits": limits}}]}),
    )
    finding = findings_of(kubeconfig)["sdxl gpu"]
    assert finding.outcome == "failed"
    assert finding.found.endswith("cpu 16 (it has 8), nvidia.com/gpu 2 (it has 1)")


def test_a_group_that_starts_empty_may_wait_for_its_nodes(api: FakeApi, kubeconfig: Path) -> None:
    api.put("nodes", node("cpu-1"))
    api.put("rayservices.ray.io", service(minReplicas=0))
    finding = findings_of(kubeconfig)["sdxl gpu"]
    assert finding.outcome == "warning"
    assert "autoscaler adds nodes" in finding.advice
    api.put("nodes", node("gpu-1", gpus=1))
    api.put("rayservices.ray.io", service(minReplicas=0, pod={"tolerations": []}))
    assert findings_of(kubeconfig)["sdxl gpu"].outcome == "failed"  # its nodes are here
