"""The checks of a cluster, by the official client from a server that has what is named here."""

from pathlib import Path

import pytest

from serve_app.doctor.cluster import look, read_overlay
from serve_app.doctor.kube import READ, Cluster, Unreachable
from serve_app.doctor.report import Finding
from serve_app.errors import ConfigError
from tests.doctor.fake_cluster import (
    RAY,
    FakeApi,
    Object,
    claim,
    node,
    operator,
    plugin,
    pod,
    service,
    storage_class,
    unscheduled,
    waiting,
    workload,
)


def _look(
    kubeconfig: Path,
    namespace: str | None = None,
    cpu: bool = False,
    overlay: list[Object] | None = None,
) -> dict[str, Finding]:
    with Cluster(namespace, kubeconfig) as cluster:
        findings = list(look(cluster, cpu, overlay))
    assert len({finding.check for finding in findings}) == len(findings)
    return {finding.check: finding for finding in findings}


def test_a_cluster_that_has_all_it_needs_passes(api: FakeApi, kubeconfig: Path) -> None:
    findings = _look(kubeconfig)
    assert {finding.outcome for finding in findings.values()} == {"ok"}, findings
    assert findings["cluster"].found == "fake, Kubernetes v1.34.1, namespace pictures"
    assert findings["GPU nodes"].found == "1 with 1 nvidia.com/gpu (NVIDIA-L4)"
    assert findings["sdxl gpu"].found == "1 of 2 nodes can take its pods"
    assert len(api.asked) == len(set(api.asked)), "asked twice"


# The way to the cluster.


def test_nobody_there_is_one_failure(api: FakeApi, tmp_path: Path) -> None:
    path = api.kubeconfig(tmp_path, url="http://127.0.0.1:1")
    findings = _look(path)
    assert list(findings) == ["cluster"]
    assert "http://127.0.0.1:1 (fake) cannot be reached" in findings["cluster"].found
    assert "kubectl version" in findings["cluster"].advice


def test_a_server_without_tls_is_a_trouble_of_certificates(api: FakeApi, tmp_path: Path) -> None:
    findings = _look(api.kubeconfig(tmp_path, url=api.url.replace("http:", "https:")))
    assert "fetch the kubeconfig anew" in findings["cluster"].advice


def test_credentials_that_have_run_out_are_one_failure(api: FakeApi, tmp_path: Path) -> None:
    findings = _look(api.kubeconfig(tmp_path, token="old"))
    assert list(findings) == ["cluster"]
    assert "does not know who asks: Unauthorized" in findings["cluster"].found
    assert "log in again" in findings["cluster"].advice


@pytest.mark.parametrize("content", [None, "{", "apiVersion: v1\nkind: Config\n"])
def test_no_kubeconfig_is_told(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "kubeconfig"
    if content is not None:
        path.write_text(content)
    with pytest.raises(Unreachable, match="no cluster is configured") as raised:
        Cluster(None, path)
    assert "KUBECONFIG" in raised.value.advice


def test_what_may_not_be_looked_at_fails_alone_and_says_who_grants_it(
    api: FakeApi, kubeconfig: Path
) -> None:
    api.refusals = dict.fromkeys(("nodes", "deployments.apps", "pods"), 403)
    findings = _look(kubeconfig)
    for check, question in {
        "KubeRay operator": "kubectl auth can-i list deployments.apps --all-namespaces`",
        "GPU nodes": "kubectl auth can-i list nodes`",
        "pods' places": "kubectl auth can-i list nodes`",
        "pods": "kubectl auth can-i list pods -n pictures`",
    }.items():
        assert findings[check].outcome == "failed"
        assert question in findings[check].found
        assert "clusterrole diffusion-serve-doctor --verb=list" in findings[check].advice
        assert "--user=jane" in findings[check].advice
        assert all(resource in findings[check].advice for resource in READ)
    assert findings["KubeRay CRDs"].outcome == "ok"
    assert findings["device plugin"].outcome == "ok"


def test_a_server_in_trouble_is_told(api: FakeApi, kubeconfig: Path) -> None:
    api.refusals = {"nodes": 500}
    findings = _look(kubeconfig)
    assert (
        "the API server answers 500: etcdserver: request timed out" in findings["GPU nodes"].found
    )
    assert "kubectl get nodes`" in findings["GPU nodes"].advice


def test_the_version_may_be_refused(api: FakeApi, kubeconfig: Path) -> None:
    api.refusals = {"version": 403}
    assert _look(kubeconfig)["cluster"].outcome == "failed"


def test_the_role_that_is_advised_covers_all_that_is_read(api: FakeApi, kubeconfig: Path) -> None:
    api.put("rayservices.ray.io", service(claim="weights"))
    api.put("persistentvolumeclaims", claim())
    _look(kubeconfig)
    asked = set()
    for path in api.asked:
        if path != "/version" and not path.endswith(("ray.io", "ray.io/v1", "ray.io/v1alpha1")):
            parts = path.strip("/").split("/")
            asked.add(parts[-1] + ("" if parts[0] == "api" else f".{parts[1]}"))
    assert asked == set(READ)


# KubeRay.


@pytest.mark.parametrize(
    ("served", "found", "advice"),
    [
        ({}, "no API group ray.io", "helm upgrade --install"),
        ({"v1": ["rayclusters"]}, "ray.io/v1 has no rayservices; served are v1", "--server-side"),
        (
            {"v1alpha1": ["rayclusters", "rayservices"]},
            "has no rayservices and no rayclusters; served are v1alpha1",
            "--server-side",
        ),
    ],
)
def test_crds_must_be_served(
    api: FakeApi, kubeconfig: Path, served: dict[str, list[str]], found: str, advice: str
) -> None:
    api.ray = served
    finding = _look(kubeconfig)["KubeRay CRDs"]
    assert finding.outcome == "failed"
    assert found in finding.found
    assert advice in finding.advice


@pytest.mark.parametrize(
    ("operators", "outcome", "found", "advice"),
    [
        ([], "failed", "no deployment", "helm upgrade --install"),
        ([operator(available=0)], "failed", "not available", "describe pod"),
        ([operator(":v1.5.1")], "failed", "older than 1.7.0", "CRDs first"),
        ([operator(":v1.8.0")], "warning", "newer than 1.7.0", "notes"),
        ([operator("@sha256:0")], "warning", "version is not to be seen", "Make sure"),
        ([operator(":v1.7.2")], "ok", "system/kuberay-operator", ""),
    ],
)
def test_the_operator_must_run_in_the_right_version(
    api: FakeApi, kubeconfig: Path, operators: list[Object], outcome: str, found: str, advice: str
) -> None:
    api.put("deployments.apps", workload("other", "nginx:1", {}), *operators)
    finding = _look(kubeconfig)["KubeRay operator"]
    assert finding.outcome == outcome
    assert found in finding.found
    assert advice in finding.advice


def _not_ready(reason: str, message: str) -> Object:
    ready = {"type": "Ready", "status": "False", "reason": reason, "message": message}
    return {"conditions": [ready]}


@pytest.mark.parametrize(
    ("status", "outcome", "found"),
    [
        ({}, "warning", "no status"),
        (_not_ready("Initializing", "waiting"), "failed", "not ready: Initializing waiting"),
        (
            {
                "pendingServiceStatus": {
                    "applicationStatuses": {
                        "app": {"status": "DEPLOY_FAILED", "message": "no such model"},
                        "other": {"status": "RUNNING"},
                    }
                }
            },
            "failed",
            "application app is DEPLOY_FAILED: no such model",
        ),
    ],
)
def test_what_kuberay_says_of_a_service_is_shown(
    api: FakeApi, kubeconfig: Path, status: Object, outcome: str, found: str
) -> None:
    api.put("rayservices.ray.io", service(status))
    finding = _look(kubeconfig)["RayService sdxl"]
    assert finding.outcome == outcome
    assert finding.found == found


def test_pods_that_cannot_be_made_are_shown(api: FakeApi, kubeconfig: Path) -> None:
    failure = {
        "type": "ReplicaFailure",
        "status": "True",
        "reason": "FailedCreateWorkerPod",
        "message": 'tolerations[0].effect: Unsupported value: "NoSchedul"',
    }
    fine = {
        "metadata": {"name": "ok", "namespace": "pictures"},
        "status": {"conditions": [failure | {"status": "False"}]},
    }
    broken = {
        "metadata": {"name": "sdxl-1", "namespace": "pictures"},
        "status": {"conditions": [failure]},
    }
    api.put("rayclusters.ray.io", fine, broken)
    findings = _look(kubeconfig)
    assert "FailedCreateWorkerPod" in findings["RayCluster sdxl-1"].found
    assert "RayCluster ok" not in findings


def test_another_version_of_ray_is_warned_of(api: FakeApi, kubeconfig: Path) -> None:
    other = service()
    other["spec"]["rayClusterConfig"]["rayVersion"] = "2.9.0"
    api.put("rayservices.ray.io", other)
    finding = _look(kubeconfig)["Ray version"]
    assert finding.outcome == "warning"
    assert finding.found == f"sdxl says 2.9.0, here is {RAY}"


# GPU nodes.


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
    finding = _look(kubeconfig)["device plugin"]
    assert finding.outcome == outcome
    assert found in finding.found
    assert advice in finding.advice


def test_a_cluster_without_gpus_fails_unless_none_is_expected(
    api: FakeApi, kubeconfig: Path
) -> None:
    api.put("daemonsets.apps")
    api.put("nodes", node("cpu-1"))
    findings = _look(kubeconfig)
    assert findings["device plugin"].outcome == "failed"
    assert "cluster/platform" in findings["device plugin"].advice
    assert findings["GPU nodes"].found == "none of 1 offers nvidia.com/gpu"
    api.put("rayservices.ray.io", service(pod={"nodeSelector": {}, "containers": [{"name": "w"}]}))
    without = _look(kubeconfig, cpu=True)
    assert {finding.outcome for finding in without.values()} == {"ok"}
    assert not without.keys() & {"device plugin", "GPU nodes"}


def test_gpus_that_nobody_can_have_fail(api: FakeApi, kubeconfig: Path) -> None:
    seen = {"nvidia.com/gpu.present": "true"}
    api.put("nodes", node("sick", capacity=4), node("unplugged", **seen))
    finding = _look(kubeconfig)["GPU nodes"]
    assert finding.outcome == "failed"
    assert finding.found.startswith("sick, unplugged: GPUs that no pod can have")


def test_parts_of_gpus_count_as_gpus(api: FakeApi, kubeconfig: Path) -> None:
    split = node("mig-1", **{"nvidia.com/gpu.product": "NVIDIA-A100"})
    split["status"]["allocatable"]["nvidia.com/mig-3g.20gb"] = "2"
    api.put("nodes", split)
    finding = _look(kubeconfig)["GPU nodes"]
    assert finding.found == "1 with 2 nvidia.com/mig-3g.20gb (NVIDIA-A100)"


@pytest.mark.parametrize(
    "label",
    [
        {"nvidia.com/gpu.sharing-strategy": "time-slicing"},
        {"nvidia.com/gpu.sharing-strategy": "mps"},
        {"nvidia.com/gpu.replicas": "4"},
    ],
)
def test_shared_gpus_are_warned_of(api: FakeApi, kubeconfig: Path, label: dict[str, str]) -> None:
    alone = {"nvidia.com/gpu.sharing-strategy": "none", "nvidia.com/gpu.replicas": "1"}
    api.put("nodes", node("gpu-1", gpus=4, **label), node("gpu-2", gpus=1, **alone))
    finding = _look(kubeconfig)["GPU sharing"]
    assert finding.outcome == "warning"
    assert finding.found.startswith("gpu-1: ")


def test_nodes_without_labels_of_feature_discovery_are_warned_of(
    api: FakeApi, kubeconfig: Path
) -> None:
    bare = node("gpu-1", gpus=1)
    del bare["metadata"]["labels"]["nvidia.com/gpu.product"]
    api.put("nodes", bare)
    findings = _look(kubeconfig)
    assert findings["GPU nodes"].outcome == "warning"
    assert "gfd.enabled=true" in findings["GPU nodes"].advice
    assert findings["sdxl gpu"].found == "no node has nvidia.com/gpu.product=NVIDIA-L4"
    assert "gfd.enabled=true" in findings["sdxl gpu"].advice


# Whether pods find a place.


def test_a_missing_toleration_is_written_out(api: FakeApi, kubeconfig: Path) -> None:
    api.put("rayservices.ray.io", service(pod={"tolerations": []}))
    finding = _look(kubeconfig)["sdxl gpu"]
    assert finding.outcome == "failed"
    assert "it does not tolerate nvidia.com/gpu=present:NoSchedule" in finding.found
    assert finding.advice == (
        "Add to the pod template:\n  tolerations:\n"
        "  - {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}"
    )


def test_a_toleration_is_missed_where_nothing_is_selected(api: FakeApi, kubeconfig: Path) -> None:
    """As in KubeRay's own samples: nodes without a GPU are too small, and that is not the fault."""
    api.put("rayservices.ray.io", service(pod={"tolerations": [], "nodeSelector": {}}))
    finding = _look(kubeconfig)["sdxl gpu"]
    assert finding.found == "it does not tolerate nvidia.com/gpu=present:NoSchedule"


def test_all_that_is_wrong_at_once_is_told(api: FakeApi, kubeconfig: Path) -> None:
    api.put("nodes", node("gpu-1", gpus=1))
    limits = {"nvidia.com/gpu": 4}
    container = {"name": "w", "resources": {"limits": limits}}
    wrong = {"tolerations": [], "nodeSelector": {"pool": "gpu"}, "containers": [container]}
    api.put("rayservices.ray.io", service(pod=wrong))
    finding = _look(kubeconfig)["sdxl gpu"]
    assert finding.found == (
        "no node has pool=gpu; it does not tolerate nvidia.com/gpu=present:NoSchedule; its pods "
        "ask for more than a node has: nvidia.com/gpu 4 (most: 1)"
    )


def test_a_cordoned_node_is_no_matter_of_tolerations(api: FakeApi, kubeconfig: Path) -> None:
    cordoned = node("gpu-1", gpus=1)
    cordoned["spec"]["taints"].append(
        {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}
    )
    api.put("nodes", node("cpu-1"), cordoned)
    finding = _look(kubeconfig)["sdxl gpu"]
    assert "node.kubernetes.io/unschedulable:NoSchedule" in finding.found
    assert "kubectl uncordon" in finding.advice


def test_another_gpu_than_the_one_selected_is_told(api: FakeApi, kubeconfig: Path) -> None:
    api.put("nodes", node("a", gpus=1, **{"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}))
    finding = _look(kubeconfig)["sdxl gpu"]
    assert finding.outcome == "failed"
    assert "Nodes here have NVIDIA-H100-80GB-HBM3" in finding.advice


def test_labels_of_others_are_named(api: FakeApi, kubeconfig: Path) -> None:
    api.put("rayservices.ray.io", service(pod={"nodeSelector": {"pool": "gpu"}}))
    finding = _look(kubeconfig)["sdxl gpu"]
    assert finding.found == "no node has pool=gpu"
    assert "Add a node with these labels" in finding.advice
    api.put("nodes")
    assert _look(kubeconfig)["sdxl gpu"].found == "there are no nodes"


def test_a_pod_that_is_larger_than_any_node_is_told(api: FakeApi, kubeconfig: Path) -> None:
    limits = {"nvidia.com/gpu": 2, "memory": "30Gi", "cpu": 16}
    api.put(
        "rayservices.ray.io",
        service(pod={"containers": [{"name": "w", "resources": {"limits": limits}}]}),
    )
    finding = _look(kubeconfig)["sdxl gpu"]
    assert finding.outcome == "failed"
    assert finding.found.endswith("cpu 16 (most: 8), nvidia.com/gpu 2 (most: 1)")


def test_a_group_that_starts_empty_may_wait_for_its_nodes(api: FakeApi, kubeconfig: Path) -> None:
    api.put("nodes", node("cpu-1"))
    api.put("rayservices.ray.io", service(minReplicas=0))
    finding = _look(kubeconfig)["sdxl gpu"]
    assert finding.outcome == "warning"
    assert "autoscaler adds nodes" in finding.advice
    api.put("nodes", node("gpu-1", gpus=1))
    api.put("rayservices.ray.io", service(minReplicas=0, pod={"tolerations": []}))
    assert _look(kubeconfig)["sdxl gpu"].outcome == "failed"  # its nodes are here


def test_an_overlay_is_compared_before_it_is_applied(api: FakeApi, kubeconfig: Path) -> None:
    assert _look(kubeconfig, namespace="other")["pods' places"].outcome == "warning"
    api.put("rayservices.ray.io")
    assert _look(kubeconfig)["pods' places"].outcome == "warning"
    findings = _look(kubeconfig, overlay=[service(pod={"tolerations": []})])
    assert findings["sdxl gpu"].outcome == "failed"
    assert "pods' places" not in findings


def test_an_amount_that_is_none_is_a_mistake_of_the_manifest(kubeconfig: Path) -> None:
    limits = {"memory": "32 GB"}
    wrong = service(pod={"containers": [{"name": "w", "resources": {"limits": limits}}]})
    with pytest.raises(ConfigError, match="'32 GB' is no amount"):
        _look(kubeconfig, overlay=[wrong])


def test_an_overlay_is_rendered_first() -> None:
    text = "kind: Namespace\n---\nkind: RayService\nmetadata: {name: x}\nspec: {}\n---\n"
    assert [one["kind"] for one in read_overlay(text, "x.yaml")] == ["Namespace", "RayService"]
    with pytest.raises(ConfigError, match="kubectl kustomize"):
        read_overlay("kind: Kustomization\n", "kustomization.yaml")
    with pytest.raises(ConfigError, match="without spec"):
        read_overlay("kind: RayService\nmetadata: {name: x}\n", "x.yaml")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_overlay("{", "x.yaml")


# Storage.


@pytest.mark.parametrize(
    ("claims", "classes", "outcome", "found", "advice"),
    [
        ([], [], "failed", "does not have it", "model-cache"),
        ([claim("Bound", volumeName="pv-1")], [], "ok", "bound to pv-1", ""),
        (
            [claim()],
            [storage_class("slow"), storage_class("fast", True)],
            "ok",
            "default StorageClass fast",
            "",
        ),
        ([claim()], [storage_class("slow")], "failed", "none is the default", "one of slow, or"),
        ([claim()], [], "failed", "none is the default", "(none is here)"),
        ([claim(storageClassName="slow")], [storage_class("slow")], "ok", "StorageClass slow", ""),
        (
            [claim(storageClassName="nfs")],
            [storage_class("slow")],
            "failed",
            "nfs does not exist",
            "slow",
        ),
        ([claim(storageClassName="")], [], "warning", "not bound", "by hand"),
    ],
)
def test_claims_must_find_their_storage(
    api: FakeApi,
    kubeconfig: Path,
    claims: list[Object],
    classes: list[Object],
    outcome: str,
    found: str,
    advice: str,
) -> None:
    api.put("rayservices.ray.io", service(claim="weights"))
    api.put("persistentvolumeclaims", *claims)
    api.put("storageclasses.storage.k8s.io", *classes)
    finding = _look(kubeconfig)["claim weights"]
    assert finding.outcome == outcome
    assert found in finding.found
    assert advice in finding.advice


def test_a_claim_may_come_with_the_overlay(api: FakeApi, kubeconfig: Path) -> None:
    api.put("storageclasses.storage.k8s.io", storage_class("slow", True))
    coming = claim()
    del coming["status"]
    findings = _look(kubeconfig, overlay=[service(claim="weights"), coming])
    assert findings["claim weights"].outcome == "ok"


# Pods that do not run.


@pytest.mark.parametrize(
    ("stuck", "outcome", "found", "advice"),
    [
        (
            unscheduled("p", "0/3 nodes are available: 1 node(s) had untolerated taint {a: b}."),
            "failed",
            "untolerated taint {a: b}",
            "toleration for the taint",
        ),
        (
            unscheduled("p", "2 node(s) didn't match Pod's node affinity/selector."),
            "failed",
            "didn't match",
            "--show-labels",
        ),
        (
            unscheduled("p", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
            "failed",
            "Insufficient nvidia.com/gpu",
            "All GPUs are taken",
        ),
        (unscheduled("p", "3 Insufficient memory."), "failed", "Insufficient memory", "requests"),
        (unscheduled("p", "1 Too many pods."), "failed", "Too many pods", "full of pods"),
        (
            unscheduled("p", 'persistentvolumeclaim "weights" not found'),
            "failed",
            "not found",
            "Apply the claim",
        ),
        (
            unscheduled("p", "pod has unbound immediate PersistentVolumeClaims."),
            "failed",
            "unbound immediate",
            "StorageClass does not exist",
        ),
        (
            unscheduled("p", "1 node(s) had volume node affinity conflict."),
            "failed",
            "affinity conflict",
            "WaitForFirstConsumer",
        ),
        (unscheduled("p", "something new"), "failed", "something new", "kubectl describe pod"),
        (
            unscheduled(
                "p", "Scheduling is blocked due to non-empty scheduling gates", "SchedulingGated"
            ),
            "warning",
            "gates",
            "Kueue",
        ),
        (pod("p"), "warning", "no scheduler", "schedulerName"),
        (
            pod("p", conditions=[{"type": "PodScheduled", "status": "True"}]),
            "warning",
            "placed",
            "takes minutes",
        ),
        (waiting("p", "ImagePullBackOff", "denied"), "failed", "ImagePullBackOff: denied", "tag"),
        (
            waiting("p", "CreateContainerConfigError", 'secret "hf" not found'),
            "failed",
            "hf",
            "Secret",
        ),
        (waiting("p", "RunContainerError", "nvidia-container-cli"), "failed", "nvidia", "Toolkit"),
        (waiting("p", "CrashLoopBackOff", phase="Running"), "failed", "CrashLoopBackOff", "137"),
        (waiting("p", "PodInitializing"), "warning", "no scheduler", ""),
    ],
)
def test_a_pod_that_does_not_run_says_why(
    api: FakeApi, kubeconfig: Path, stuck: Object, outcome: str, found: str, advice: str
) -> None:
    api.put("pods", stuck, pod("runs", phase="Running"), pod("done", phase="Succeeded"))
    finding = _look(kubeconfig)["pod p"]
    assert finding.outcome == outcome
    assert found in finding.found
    assert advice in finding.advice


def test_several_reasons_have_several_advices_and_alike_pods_one_row(
    api: FakeApi, kubeconfig: Path
) -> None:
    message = "2 Insufficient nvidia.com/gpu, 1 node(s) had untolerated taint {x: }."
    api.put("pods", *(unscheduled(name, message) for name in ("a", "b", "c")))
    findings = _look(kubeconfig)
    advice = findings["pod a and 2 more"].advice.splitlines()
    assert len(advice) == 2
    assert "pods" not in findings
