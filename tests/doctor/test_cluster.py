"""The checks of a cluster: the connection, the namespace, the overlay and storage."""

from pathlib import Path

import pytest
import yaml

from serve_app.doctor.cluster import choose_namespace, read_overlay
from serve_app.doctor.kube import READ, Cluster, Unreachable
from serve_app.errors import ConfigError
from tests.cluster.manifests import render
from tests.doctor.cluster_checks import findings_of
from tests.doctor.fake_cluster import (
    FakeApi,
    Object,
    claim,
    service,
    storage_class,
    unscheduled,
)
from tests.doctor.fake_gateways import GATEWAYS, incremental
from tests.pages import KUBERNETES

ROOT = Path(__file__).parents[2]


def test_a_cluster_that_has_all_it_needs_passes(api: FakeApi, kubeconfig: Path) -> None:
    findings = findings_of(kubeconfig)
    assert {finding.outcome for finding in findings.values()} == {"ok"}, findings
    assert findings["cluster"].found == "fake, Kubernetes v1.34.1, namespace images"
    assert findings["GPU nodes"].found == "1 with 1 nvidia.com/gpu (NVIDIA-L4)"
    assert findings["sdxl gpu"].found == "1 of 2 nodes can take its pods"
    assert len(api.asked) == len(set(api.asked)), "asked twice"


def test_a_manifest_is_checked_among_the_rows(api: FakeApi, kubeconfig: Path) -> None:
    wrong = service()
    wrong["spec"]["rayClusterDeletionDelaySeconds"] = 60
    wrong["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["idleTimeoutSeconds"] = 120
    findings = findings_of(kubeconfig, overlay=[wrong])
    assert findings["sdxl rejected"].outcome == "failed"
    assert "idleTimeoutSeconds is 120" in findings["sdxl rejected"].found
    assert "rayClusterDeletionDelaySeconds is 60" in findings["sdxl deadlines"].found
    right = findings_of(kubeconfig, overlay=[service()])
    assert right["sdxl operator"].outcome == right["sdxl deadlines"].outcome == "ok"


# The connection.


def test_an_unreachable_server_is_one_failure(api: FakeApi, tmp_path: Path) -> None:
    path = api.kubeconfig(tmp_path, url="http://127.0.0.1:1")
    findings = findings_of(path)
    assert list(findings) == ["cluster"]
    assert "http://127.0.0.1:1 (fake) cannot be reached" in findings["cluster"].found
    assert "kubectl version" in findings["cluster"].advice


def test_a_server_without_tls_is_a_trouble_of_certificates(api: FakeApi, tmp_path: Path) -> None:
    findings = findings_of(api.kubeconfig(tmp_path, url=api.url.replace("http:", "https:")))
    assert "get a new kubeconfig" in findings["cluster"].advice


def test_credentials_that_have_run_out_are_one_failure(api: FakeApi, tmp_path: Path) -> None:
    findings = findings_of(api.kubeconfig(tmp_path, token="old"))
    assert list(findings) == ["cluster"]
    assert "rejects the credentials: Unauthorized" in findings["cluster"].found
    assert "log in again" in findings["cluster"].advice


@pytest.mark.parametrize("content", [None, "{", "apiVersion: v1\nkind: Config\n"])
def test_no_kubeconfig_is_reported(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "kubeconfig"
    if content is not None:
        path.write_text(content)
    with pytest.raises(Unreachable, match="no cluster is configured") as raised:
        Cluster(None, path)
    assert "KUBECONFIG" in raised.value.advice


def test_a_forbidden_list_fails_alone_with_the_command_that_grants_it(
    api: FakeApi, kubeconfig: Path
) -> None:
    api.refusals = dict.fromkeys(("nodes", "deployments.apps", "pods"), 403)
    findings = findings_of(kubeconfig)
    for check, question in {
        "KubeRay operator": "kubectl auth can-i list deployments.apps --all-namespaces`",
        "GPU nodes": "kubectl auth can-i list nodes`",
        "pods' places": "kubectl auth can-i list nodes`",
        "pods": "kubectl auth can-i list pods -n images`",
    }.items():
        assert findings[check].outcome == "failed"
        assert question in findings[check].found
        assert "clusterrole diffusion-serve-doctor --verb=list" in findings[check].advice
        assert "--user=jane" in findings[check].advice
        named = set(findings[check].advice.partition("--resource=")[2].split()[0].split(","))
        # kubectl makes no role for what the cluster does not know.
        assert set(READ) - named == {one for one in READ if "gateway" in one}
    api.kinds |= GATEWAYS
    assert all(resource in findings_of(kubeconfig)["pods"].advice for resource in READ)
    assert findings["KubeRay CRDs"].outcome == "ok"
    assert findings["device plugin"].outcome == "ok"


def test_an_error_of_the_server_is_reported(api: FakeApi, kubeconfig: Path) -> None:
    api.refusals = {"nodes": 500}
    findings = findings_of(kubeconfig)
    assert (
        "the API server answers 500: etcdserver: request timed out" in findings["GPU nodes"].found
    )
    assert "kubectl get nodes`" in findings["GPU nodes"].advice


def test_a_rejected_version_is_one_failure(api: FakeApi, kubeconfig: Path) -> None:
    api.refusals = {"version": 403}
    assert findings_of(kubeconfig)["cluster"].outcome == "failed"


def test_the_role_that_is_advised_covers_all_that_is_read(api: FakeApi, kubeconfig: Path) -> None:
    api.kinds |= GATEWAYS
    keys = {"volumes": [{"name": "keys", "secret": {"secretName": "api-keys"}}]}
    api.put("rayservices.ray.io", incremental(service(claim="weights")))
    api.put("persistentvolumeclaims", claim())
    api.put("gateways.gateway.networking.k8s.io")
    api.put("gatewayclasses.gateway.networking.k8s.io")
    findings_of(kubeconfig, overlay=[incremental(service(pod=keys))])
    findings_of(kubeconfig)
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


# The namespace.


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
    api.put("rayservices.ray.io", _in("images", of_ours=False), _in("diffusion-serve"))
    api.put("pods", _stuck_in("diffusion-serve"))
    findings = findings_of(kubeconfig)
    assert findings["cluster"].found.endswith("namespace diffusion-serve")
    assert findings["RayService sdxl"].outcome == "ok"
    assert findings["pod p"].outcome == "failed"


def test_a_requested_namespace_is_kept_and_the_right_one_named(
    api: FakeApi, kubeconfig: Path
) -> None:
    findings = findings_of(kubeconfig, namespace="default")
    assert findings["cluster"].found.endswith("namespace default")
    finding = findings["RayService"]
    assert finding.outcome == "failed"
    assert finding.found == "no RayService of diffusion-serve in namespace default; found in images"
    assert "  diffusion-serve doctor --cluster --namespace images" in finding.advice
    assert "pods" not in findings


def test_several_services_are_not_chosen_among(api: FakeApi, kubeconfig: Path) -> None:
    api.put("rayservices.ray.io", _in("a"), _in("b"))
    finding = findings_of(kubeconfig)["RayService"]
    assert finding.outcome == "failed"
    assert finding.found.endswith("found in a, b")
    assert "--namespace a\n" in finding.advice


def test_without_a_service_the_advice_is_to_compare_the_overlay(
    api: FakeApi, kubeconfig: Path
) -> None:
    api.put("rayservices.ray.io", _in("elsewhere", of_ours=False))
    api.put("pods")
    findings = findings_of(kubeconfig)
    finding = findings["RayService"]
    assert finding.outcome == "warning"
    assert finding.found == "no RayService of diffusion-serve in namespace images, or in any other"
    command = finding.advice.splitlines()[-1]
    assert "--overlay -" in command
    assert command.strip() in (ROOT / KUBERNETES).read_text().splitlines()
    assert not findings.keys() & {"pods", "storage"}  # none of none is no answer


def test_other_namespaces_may_not_be_read(api: FakeApi, kubeconfig: Path) -> None:
    api.put("rayservices.ray.io")
    api.refusals = {"/apis/ray.io/v1/rayservices": 403}
    finding = findings_of(kubeconfig)["RayService"]
    assert finding.outcome == "warning"
    assert "namespace images; other namespaces may not be read" in finding.found
    assert "--namespace NAMESPACE" in finding.advice


def test_services_that_may_not_be_read_fail(api: FakeApi, kubeconfig: Path) -> None:
    api.refusals = {"rayservices.ray.io": 403}
    findings = findings_of(kubeconfig)
    assert "kubectl auth can-i list rayservices.ray.io" in findings["RayService"].found
    assert findings["GPU nodes"].outcome == "ok"


def test_an_overlay_names_its_namespace() -> None:
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


def test_manifests_of_this_project_are_recognized_by_their_import_path(
    api: FakeApi, kubeconfig: Path
) -> None:
    api.put("rayservices.ray.io", render(ROOT / "cluster" / "overlays" / "single-gpu").service)
    findings = findings_of(kubeconfig)
    assert findings["cluster"].found.endswith("namespace diffusion-serve")


def test_before_it_is_applied_its_namespace_has_no_pods(api: FakeApi, kubeconfig: Path) -> None:
    coming = _in("new")
    finding = findings_of(kubeconfig, namespace="new", overlay=[coming])["pods"]
    assert (finding.outcome, finding.found) == ("ok", "namespace new has none yet")
    api.put("pods")
    assert findings_of(kubeconfig)["pods"].outcome == "warning"  # a service has none


def test_an_overlay_is_compared_before_it_is_applied(api: FakeApi, kubeconfig: Path) -> None:
    api.put("rayservices.ray.io")
    findings = findings_of(kubeconfig, overlay=[service(pod={"tolerations": []})])
    assert findings["sdxl gpu"].outcome == "failed"
    assert "RayService" not in findings


def test_a_malformed_amount_is_an_error_of_the_manifest(kubeconfig: Path) -> None:
    limits = {"memory": "32 GB"}
    wrong = service(pod={"containers": [{"name": "w", "resources": {"limits": limits}}]})
    with pytest.raises(ConfigError, match="'32 GB' is not an amount"):
        findings_of(kubeconfig, overlay=[wrong])


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
        (
            [claim()],
            [storage_class("slow")],
            "failed",
            "has no default StorageClass",
            "one of slow, or",
        ),
        ([claim()], [], "failed", "has no default StorageClass", "(there are none)"),
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
    finding = findings_of(kubeconfig)["claim weights"]
    assert finding.outcome == outcome
    assert found in finding.found
    assert advice in finding.advice


def test_a_claim_may_come_with_the_overlay(api: FakeApi, kubeconfig: Path) -> None:
    api.put("storageclasses.storage.k8s.io", storage_class("slow", True))
    coming = claim()
    del coming["status"]
    findings = findings_of(kubeconfig, overlay=[service(claim="weights"), coming])
    assert findings["claim weights"].outcome == "ok"
