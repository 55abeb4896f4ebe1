"""The room for an overlay's pods, before it is applied."""

from pathlib import Path

from serve_app.doctor.cluster import look
from serve_app.doctor.kube import Cluster
from serve_app.doctor.report import Finding
from tests.doctor.fake_cluster import FakeApi, node, on, service

GPU = {"nvidia.com/gpu": "1"}


def _place(kubeconfig: Path, **worker: int) -> Finding:
    with Cluster(None, kubeconfig) as cluster:
        findings = look(cluster, cpu=False, overlay=[service(**worker)])
        return next(finding for finding in findings if finding.check == "sdxl gpu")


def test_free_gpus_are_counted(api: FakeApi, kubeconfig: Path) -> None:
    api.put("rayservices.ray.io")
    api.put("nodes", node("cpu-1"), node("gpu-1", gpus=1), node("gpu-2", gpus=1))
    api.put("pods", on("gpu-1", "taker", namespace="training", **GPU))
    finding = _place(kubeconfig)
    assert (finding.outcome, finding.found) == ("ok", "1 of 3 nodes can take its pods now")


def test_nodes_that_fit_and_are_full_are_warnings(api: FakeApi, kubeconfig: Path) -> None:
    api.put("rayservices.ray.io")
    api.put("pods", on("gpu-1", "taker", namespace="training", **GPU))
    finding = _place(kubeconfig)
    assert finding.outcome == "warning"
    assert finding.found == (
        "full at the moment: 1 node fits (gpu-1), lacks 1 nvidia.com/gpu: taken by pod "
        "training/taker"
    )
    assert "autoscaler" in finding.advice


def test_a_service_that_runs_may_be_applied_again(api: FakeApi, kubeconfig: Path) -> None:
    api.put("rayservices.ray.io", service({"activeServiceStatus": {"rayClusterName": "sdxl-1"}}))
    api.put("pods", on("gpu-1", "sdxl-1-worker-a", **GPU))
    finding = _place(kubeconfig)
    assert finding.outcome == "warning"
    assert finding.advice.startswith("It runs already")
    assert "second cluster of an upgrade needs spare GPUs" in finding.advice


def test_without_rights_to_list_pods_nodes_count_as_empty(api: FakeApi, kubeconfig: Path) -> None:
    api.put("pods", on("gpu-1", "taker", namespace="training", **GPU))
    api.refusals = {"/api/v1/pods": 403}
    finding = _place(kubeconfig)
    assert finding.outcome == "ok"
    assert finding.found.startswith(
        "1 of 2 nodes can take its pods when empty; the free room is unknown"
    )
