"""The checks of a cluster, by the official client from a server that has what is named here."""

from pathlib import Path

import pytest
import yaml

from serve_app.doctor.cluster import choose_namespace, look, read_overlay
from serve_app.doctor.kube import READ, Cluster, Unreachable
from serve_app.doctor.kuberay import INSTALL
from serve_app.doctor.report import Finding
from serve_app.errors import ConfigError
from tests.cluster.manifests import render
from tests.doctor.fake_cluster import (
    RAY,
    FakeApi,
    Object,
    claim,
    ended,
    event,
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
from tests.doctor.fake_gateways import GATEWAYS, incremental

ROOT = Path(__file__).parents[2]


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


def test_a_manifest_is_checked_among_the_rows(api: FakeApi, kubeconfig: Path) -> None:
    wrong = service()
    wrong["spec"]["rayClusterDeletionDelaySeconds"] = 60
    wrong["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["idleTimeoutSeconds"] = 120
    findings = _look(kubeconfig, overlay=[wrong])
    assert findings["sdxl refused"].outcome == "failed"
    assert "idleTimeoutSeconds is 120" in findings["sdxl refused"].found
    assert "rayClusterDeletionDelaySeconds is 60" in findings["sdxl deadlines"].found
    right = _look(kubeconfig, overlay=[service()])
    assert right["sdxl operator"].outcome == right["sdxl deadlines"].outcome == "ok"


# The way to the cluster.


def test_nobody_there_is_one_failure(api: FakeApi, tmp_path: Path) -> None:
    path = api.kubeconfig(tmp_path, url="http://127.0.0.1:1")
    findings = _look(path)
    assert list(findings) == ["cluster"]
    assert "http://127.0.0.1:1 (fake) cannot be reached" in findings["cluster"].found
    assert "kubectl version" in findings["cluster"].advice


def test_a_server_without_tls_is_a_trouble_of_certificates(api: FakeApi, tmp_path: Path) -> None:
    findings = _look(api.kubeconfig(tmp_path, url=api.url.replace("http:", "https:")))
    assert "get a new kubeconfig" in findings["cluster"].advice


def test_credentials_that_have_run_out_are_one_failure(api: FakeApi, tmp_path: Path) -> None:
    findings = _look(api.kubeconfig(tmp_path, token="old"))
    assert list(findings) == ["cluster"]
    assert "rejects the credentials: Unauthorized" in findings["cluster"].found
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
        named = set(findings[check].advice.partition("--resource=")[2].split()[0].split(","))
        # kubectl makes no role for what the cluster does not know.
        assert set(READ) - named == {one for one in READ if "gateway" in one}
    api.kinds |= GATEWAYS
    assert all(resource in _look(kubeconfig)["pods"].advice for resource in READ)
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
    api.kinds |= GATEWAYS
    keys = {"volumes": [{"name": "keys", "secret": {"secretName": "api-keys"}}]}
    api.put("rayservices.ray.io", incremental(service(claim="weights")))
    api.put("persistentvolumeclaims", claim())
    api.put("gateways.gateway.networking.k8s.io")
    api.put("gatewayclasses.gateway.networking.k8s.io")
    _look(kubeconfig, overlay=[incremental(service(pod=keys))])
    _look(kubeconfig)
    asked, secrets = set(), set()
    for path in api.asked:
        parts = path.strip("/").split("/")
        if len(parts) <= {"version": 1, "api": 2, "apis": 3}[parts[0]]:
            continue  # which everybody may read
        if parts[-2] == "secrets":
            secrets.add(parts[-1])
        else:
            asked.add(parts[-1] + ("" if parts[0] == "api" else f".{parts[1]}"))
    assert secrets == {"api-keys"}
    assert asked == set(READ)


# Which namespace.


def _in(namespace: str, of_ours: bool = True) -> Object:
    other = service()
    other["metadata"]["namespace"] = namespace
    if not of_ours:
        other["spec"]["serveConfigV2"] = "applications: [{import_path: 'theirs:app'}]"
    return other


def _stuck_in(namespace: str) -> Object:
    stuck = unscheduled("p", "3 Insufficient memory.")
    stuck["metadata"]["namespace"] = namespace
    return stuck


def test_the_service_is_found_in_another_namespace_than_the_kubeconfigs(
    api: FakeApi, kubeconfig: Path
) -> None:
    api.put("rayservices.ray.io", _in("pictures", of_ours=False), _in("diffusion-serve"))
    api.put("pods", _stuck_in("diffusion-serve"))
    findings = _look(kubeconfig)
    assert findings["cluster"].found.endswith("namespace diffusion-serve")
    assert findings["RayService sdxl"].outcome == "ok"
    assert findings["pod p"].outcome == "failed"


def test_a_namespace_that_is_asked_for_is_kept_and_the_right_one_told(
    api: FakeApi, kubeconfig: Path
) -> None:
    findings = _look(kubeconfig, namespace="default")
    assert findings["cluster"].found.endswith("namespace default")
    finding = findings["RayService"]
    assert finding.outcome == "failed"
    assert finding.found == "none of diffusion-serve in namespace default, but in pictures"
    assert "  diffusion-serve doctor --cluster --namespace pictures" in finding.advice
    assert "pods" not in findings


def test_several_services_are_not_chosen_among(api: FakeApi, kubeconfig: Path) -> None:
    api.put("rayservices.ray.io", _in("a"), _in("b"))
    finding = _look(kubeconfig)["RayService"]
    assert finding.outcome == "failed"
    assert finding.found.endswith("but in a, b")
    assert "--namespace a\n" in finding.advice


def test_where_nothing_is_applied_yet_the_overlay_is_asked_for(
    api: FakeApi, kubeconfig: Path
) -> None:
    api.put("rayservices.ray.io", _in("elsewhere", of_ours=False))
    api.put("pods")
    findings = _look(kubeconfig)
    finding = findings["RayService"]
    assert finding.outcome == "warning"
    assert finding.found == "none of diffusion-serve in namespace pictures, nor in any other"
    command = finding.advice.splitlines()[-1]
    assert "--overlay -" in command
    assert command.strip() in (ROOT / "README.md").read_text().splitlines()
    assert not findings.keys() & {"pods", "storage"}  # none of none is no answer


def test_other_namespaces_may_not_be_looked_at(api: FakeApi, kubeconfig: Path) -> None:
    api.put("rayservices.ray.io")
    api.refusals = {"/apis/ray.io/v1/rayservices": 403}
    finding = _look(kubeconfig)["RayService"]
    assert finding.outcome == "warning"
    assert "namespace pictures, and other namespaces may not be read" in finding.found
    assert "--namespace NAMESPACE" in finding.advice


def test_services_that_may_not_be_looked_at_fail(api: FakeApi, kubeconfig: Path) -> None:
    api.refusals = {"rayservices.ray.io": 403}
    findings = _look(kubeconfig)
    assert "kubectl auth can-i list rayservices.ray.io" in findings["RayService"].found
    assert findings["GPU nodes"].outcome == "ok"


def test_an_overlay_says_its_namespace() -> None:
    overlay = read_overlay(
        "\n---\n".join(
            yaml.safe_dump(one)
            for one in render(ROOT / "cluster" / "overlays" / "production").documents
        ),
        "-",
    )
    assert choose_namespace(overlay, "-", None) == "diffusion-serve"
    assert choose_namespace(overlay, "-", "diffusion-serve") == "diffusion-serve"
    with pytest.raises(ConfigError, match="is default, and - is for namespace diffusion-serve"):
        choose_namespace(overlay, "-", "default")
    with pytest.raises(ConfigError, match="several namespaces"):
        choose_namespace([*overlay, service()], "-", None)
    nowhere = service()
    del nowhere["metadata"]["namespace"]
    assert choose_namespace([nowhere], "-", None) is None
    assert choose_namespace([nowhere], "-", "x") == "x"


def test_our_manifests_are_known_by_what_they_import(api: FakeApi, kubeconfig: Path) -> None:
    api.put("rayservices.ray.io", render(ROOT / "cluster" / "overlays" / "single-gpu").service)
    findings = _look(kubeconfig)
    assert findings["cluster"].found.endswith("namespace diffusion-serve")


def test_before_it_is_applied_its_namespace_has_no_pods(api: FakeApi, kubeconfig: Path) -> None:
    coming = _in("new")
    finding = _look(kubeconfig, namespace="new", overlay=[coming])["pods"]
    assert (finding.outcome, finding.found) == ("ok", "namespace new has none yet")
    api.put("pods")
    assert _look(kubeconfig)["pods"].outcome == "warning"  # a service is there, and makes none


# KubeRay.


def _lines(commands: str) -> list[str]:
    """One each, whatever the indentation and the breaks of lines."""
    return [" ".join(line.split()) for line in commands.replace("\\\n", " ").splitlines()]


def test_kuberay_is_installed_as_the_platforms_page_says() -> None:
    page = _lines((ROOT / "cluster" / "platform" / "README.md").read_text())
    assert len(_lines(INSTALL)) == 2
    assert set(_lines(INSTALL)) <= set(page)
    assert sum("install kuberay-operator" in line for line in page) == 1


def test_an_upgrade_is_of_the_release_that_is_there(api: FakeApi, kubeconfig: Path) -> None:
    api.put("deployments.apps", operator(":v1.5.1", release="kuberay-operator"))
    advice = _lines(_look(kubeconfig)["KubeRay operator"].advice)
    install = _lines(INSTALL)[1].replace(" install ", " upgrade ")
    assert advice[-1] == install.replace("kuberay-operator --create-namespace", "system")
    api.put("deployments.apps", operator(":v1.5.1", release="rays"))
    assert "helm upgrade rays kuberay/" in _look(kubeconfig)["KubeRay operator"].advice
    api.put("deployments.apps", operator(":v1.5.1"))
    advice_by_hand = _look(kubeconfig)["KubeRay operator"].advice
    assert "Helm did not install it" in advice_by_hand
    assert "helm upgrade" not in advice_by_hand
    assert "helm install" not in advice_by_hand


@pytest.mark.parametrize(
    ("served", "found", "advice"),
    [
        ({}, "no API group ray.io", "--namespace kuberay-operator --create-namespace"),
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
        ([], "failed", "no deployment", "--namespace kuberay-operator --create-namespace"),
        ([operator(available=0)], "failed", "not available", "describe pod"),
        ([operator(":v1.5.1")], "failed", "older than 1.7.0", "helm show crds"),
        ([operator(":v1.8.0")], "warning", "newer than 1.7.0", "notes"),
        ([operator("@sha256:0")], "warning", "version is unknown", "Make sure"),
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


@pytest.mark.parametrize("reason", ["ValidationFailed", "InitializingTimeout"])
def test_what_kuberay_has_given_up_is_not_said_twice(
    api: FakeApi, kubeconfig: Path, reason: str
) -> None:
    api.put("rayservices.ray.io", service(_not_ready(reason, "why")))
    api.put("pods")
    findings = _look(kubeconfig)
    assert "why" in findings["RayService sdxl"].found
    assert ("kubectl -n pictures delete rayservice sdxl" in findings["RayService sdxl"].advice) == (
        reason == "InitializingTimeout"
    )
    assert "pods" not in findings


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
    assert finding.found == f"sdxl has 2.9.0, this machine {RAY}"


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


def test_no_gpu_node_is_as_it_should_be_while_the_groups_are_empty(
    api: FakeApi, kubeconfig: Path
) -> None:
    api.put("daemonsets.apps", plugin(0, 0))
    api.put("nodes", node("cpu-1"))
    api.put("rayservices.ray.io", service(minReplicas=0))
    findings = _look(kubeconfig)
    assert findings["GPU nodes"].outcome == "warning"
    assert "autoscaler adds nodes" in findings["GPU nodes"].advice
    assert "failed" not in {finding.outcome for finding in findings.values()}
    two_groups = service(minReplicas=0)
    workers = two_groups["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    workers.append(workers[0] | {"groupName": "on-demand", "minReplicas": 1})
    api.put("rayservices.ray.io", two_groups)
    assert _look(kubeconfig)["GPU nodes"].outcome == "failed"


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
    assert finding.found == "it does not tolerate nvidia.com/gpu=present:NoSchedule (gpu-1)"


def test_all_that_is_wrong_at_once_is_told(api: FakeApi, kubeconfig: Path) -> None:
    api.put("nodes", node("gpu-1", gpus=1))
    limits = {"nvidia.com/gpu": 4}
    container = {"name": "w", "resources": {"limits": limits}}
    wrong = {"tolerations": [], "nodeSelector": {"pool": "gpu"}, "containers": [container]}
    api.put("rayservices.ray.io", service(pod=wrong))
    finding = _look(kubeconfig)["sdxl gpu"]
    assert finding.found == (
        "no node has pool=gpu; it does not tolerate nvidia.com/gpu=present:NoSchedule (gpu-1); its "
        "pods ask for more than gpu-1 has: nvidia.com/gpu 4 (it has 1)"
    )
    assert "tolerations:" not in finding.advice  # they alone would change nothing


def test_a_cordoned_node_is_no_matter_of_tolerations(api: FakeApi, kubeconfig: Path) -> None:
    cordoned = node("gpu-1", gpus=1)
    cordoned["spec"]["taints"].append(
        {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}
    )
    api.put("nodes", node("cpu-1"), cordoned)
    finding = _look(kubeconfig)["sdxl gpu"]
    assert finding.found == "1 node fits (gpu-1), but is cordoned"
    assert "kubectl uncordon gpu-1" in finding.advice


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
    assert finding.found.endswith("cpu 16 (it has 8), nvidia.com/gpu 2 (it has 1)")


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
    api.put("rayservices.ray.io")
    findings = _look(kubeconfig, overlay=[service(pod={"tolerations": []})])
    assert findings["sdxl gpu"].outcome == "failed"
    assert "RayService" not in findings


def test_an_amount_that_is_none_is_a_mistake_of_the_manifest(kubeconfig: Path) -> None:
    limits = {"memory": "32 GB"}
    wrong = service(pod={"containers": [{"name": "w", "resources": {"limits": limits}}]})
    with pytest.raises(ConfigError, match="'32 GB' is not an amount"):
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
        (pod("p"), "warning", "no scheduler", "schedulerName"),
        (
            pod("p", conditions=[{"type": "PodScheduled", "status": "True"}]),
            "warning",
            "on a node",
            "takes minutes",
        ),
        (waiting("p", "ImagePullBackOff", "denied"), "failed", "ImagePullBackOff: denied", "tag"),
        (waiting("p", "ErrImageNeverPull"), "failed", "ErrImageNeverPull", "minikube image load"),
        (
            waiting("p", "CreateContainerConfigError", 'secret "hf" not found'),
            "failed",
            "hf",
            "kubectl -n pictures create secret generic hf",
        ),
        (
            waiting(
                "p",
                "CreateContainerConfigError",
                "couldn't find key token in Secret pictures/redis",
            ),
            "failed",
            "key token",
            "Add it:\n  kubectl -n pictures create secret generic redis",
        ),
        (waiting("p", "CreateContainerConfigError", "odd"), "failed", "odd", "kubectl describe"),
        (waiting("p", "RunContainerError", "nvidia-container-cli"), "failed", "nvidia", "Toolkit"),
        (waiting("p", "CrashLoopBackOff", phase="Running"), "failed", "CrashLoopBackOff", "logs"),
        (waiting("p", "PodInitializing"), "warning", "no scheduler", ""),
        (
            ended("p", 137, "OOMKilled"),
            "failed",
            "container ray-head ended with code 137 (OOMKilled)",
            "memory limit",
        ),
        (ended("p", 137, "Error"), "failed", "code 137 (Error)", "memory limit"),
        (ended("p", 1, "Error"), "failed", "code 1 (Error)", "pictures logs POD -c ray-head`"),
        (ended("p", 1, "Error", phase="Running"), "failed", "code 1 (Error)", "shows the reason"),
        (
            pod("p", phase="Failed", reason="Evicted", message="low"),
            "failed",
            "Evicted: low",
            "disk",
        ),
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


@pytest.mark.parametrize(
    ("code", "reason", "memory"), [(137, "OOMKilled", True), (1, "Error", False)]
)
def test_a_container_that_ends_again_and_again_says_how(
    api: FakeApi, kubeconfig: Path, code: int, reason: str, memory: bool
) -> None:
    looping = waiting("p", "CrashLoopBackOff", phase="Running")
    [container] = looping["status"]["containerStatuses"]
    container["lastState"] = {"terminated": {"exitCode": code, "reason": reason}}
    api.put("pods", looping)
    finding = _look(kubeconfig)["pod p"]
    assert f"container main ended with code {code} ({reason})" in finding.found
    assert ("memory limit" in finding.advice) == memory


def test_alike_pods_have_one_row(api: FakeApi, kubeconfig: Path) -> None:
    container = {"name": "w", "resources": {"limits": {"cpu": "16"}}}
    stuck = [unscheduled(name, "2 Insufficient cpu.", containers=[container]) for name in "abc"]
    api.put("pods", *stuck)
    findings = _look(kubeconfig)
    assert findings["pod a and 2 more"].outcome == "failed"
    assert "pods" not in findings


def test_pods_that_ended_well_or_are_on_their_way_out_are_no_fault(
    api: FakeApi, kubeconfig: Path
) -> None:
    leaving = ended("p", 143, "Error")
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00+00:00"
    api.put("pods", leaving, ended("q", 0, "Completed", phase="Running"))
    finding = _look(kubeconfig)["pods"]
    assert finding.found == "none of 2 in namespace pictures is pending or has failed"


_PLACED = pod("p", conditions=[{"type": "PodScheduled", "status": "True"}])
_NO_SECRET = 'MountVolume.SetUp failed for volume "keys" : secret "api-keys" not found'


@pytest.mark.parametrize(
    ("message", "outcome", "advice"),
    [
        (_NO_SECRET, "failed", "kubectl -n pictures create secret generic api-keys --from-file"),
        (
            'MountVolume.SetUp failed for volume "c" : references non-existent secret key: k',
            "failed",
            "cluster/README.md",
        ),
        ('no runtime for "nvidia" is configured', "failed", "nvidia-ctk runtime configure"),
        ('Multi-Attach error for volume "pvc-1"', "failed", "ReadWriteMany"),
        ("failed to sync configmap cache: timed out", "warning", "tries again"),
    ],
)
def test_what_a_node_says_of_its_pod_is_told(
    api: FakeApi, kubeconfig: Path, message: str, outcome: str, advice: str
) -> None:
    api.put("pods", _PLACED)
    api.put(
        "events",
        event("p", "FailedMount", message, minute=2),
        event("p", "FailedScheduling", "3 Insufficient memory.", minute=1),
        event("q", "FailedMount", "of another", minute=3),
    )
    finding = _look(kubeconfig)["pod p"]
    assert finding.outcome == outcome
    assert finding.found == f"pending: {message}"
    assert advice in finding.advice


def test_the_cause_is_told_and_not_what_comes_of_it(api: FakeApi, kubeconfig: Path) -> None:
    api.put("pods", _PLACED)
    of_it = event("p", "FailedMount", "Unable to attach or mount volumes: timed out", minute=9)
    api.put("events", of_it, event("p", "FailedMount", _NO_SECRET, minute=2))
    assert "api-keys" in _look(kubeconfig)["pod p"].found


@pytest.mark.parametrize(
    "events",
    [
        [
            event("p", "Pulling", "Pulling image", minute=3, type_="Normal"),
            event("p", "FailedMount", _NO_SECRET, minute=2),
        ],
        [event("p", "FailedScheduling", "3 Insufficient memory.", minute=1)],
    ],
)
def test_what_hindered_a_pod_before_is_over(
    api: FakeApi, kubeconfig: Path, events: list[Object]
) -> None:
    api.put("pods", _PLACED)
    api.put("events", *events)
    finding = _look(kubeconfig)["pod p"]
    assert finding.outcome == "warning"
    assert "takes minutes" in finding.advice


def test_events_that_may_not_be_looked_at_hide_no_pod(api: FakeApi, kubeconfig: Path) -> None:
    api.put("pods", _PLACED)
    api.refusals = {"events": 403}
    findings = _look(kubeconfig)
    assert "kubectl auth can-i list events -n pictures" in findings["events"].found
    assert findings["pod p"].outcome == "warning"


def test_pods_that_kuberay_has_replaced_are_told_of(api: FakeApi, kubeconfig: Path) -> None:
    """By its events, in the words of KubeRay 1.7 and of the API types' String()."""

    def deleted(name: str, state: str, minute: int) -> Object:
        message = (
            f"Deleted worker Pod pictures/{name}; Pod status: Failed; Pod restart policy: Never; "
            f"Ray container terminated status: {state}"
        )
        return event("sdxl-1", "DeletedWorkerPod", message, minute, "RayCluster", "Normal")

    state = (
        "&ContainerStateTerminated{ExitCode:137,Signal:0,Reason:OOMKilled,Message:,"
        "StartedAt:2026-01-01 00:00:00 +0000 UTC,FinishedAt:2026-01-01 00:01:00 +0000 UTC,"
        "ContainerID:containerd://0,}"
    )
    by_the_autoscaler = event(
        "sdxl-1", "DeletedWorkerPod", "Deleted pod pictures/w0", 9, "RayCluster", "Normal"
    )
    api.put("events", by_the_autoscaler)
    assert "replaced pods" not in _look(kubeconfig)
    api.put("events", deleted("w2", state, 2), deleted("w1", "nil", 1), by_the_autoscaler)
    finding = _look(kubeconfig)["replaced pods"]
    assert finding.outcome == "warning"
    assert finding.found.startswith("2 that had ended")
    assert finding.found.endswith("the last: w2, Failed, exit code 137 (OOMKilled)")
