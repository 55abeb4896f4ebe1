"""The objects that a rehearsal makes from an overlay, without a cluster."""

import base64
from pathlib import Path

import pytest
import yaml

from serve_app.doctor.kube import Object
from serve_app.doctor.rehearsal.manifest import MARK, MARKED, Manifest, prepare
from serve_app.errors import ConfigError
from serve_app.gateway.auth import KeyRing
from tests.cluster.manifests import render
from tests.doctor.rehearsal.rehearsals import service

ROOT = Path(__file__).parents[3]


def _prepare(*overlay: Object) -> Manifest:
    return prepare(overlay, "overlay.yaml", lambda one: one["kind"] != "ClusterRole")


def _object(kind: str, api_version: str = "v1", **fields: object) -> Object:
    metadata = {"name": "x", "namespace": "images"}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata} | fields


def _data(manifest: Manifest, name: str) -> dict[str, str]:
    [secret] = [
        one
        for one in manifest.objects
        if one["kind"] == "Secret" and one["metadata"]["name"] == name
    ]
    return {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}


def test_all_goes_into_a_namespace_of_its_own_with_the_labels_of_the_overlay_s() -> None:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    own = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": "images", "labels": labels},
    }
    manifest = _prepare(own, _object("ServiceAccount"), service())
    assert manifest.name.startswith("images-rehearsal-")
    assert manifest.namespace["metadata"]["labels"] == labels | {MARK: MARKED}
    assert {one["metadata"]["namespace"] for one in manifest.objects} == {manifest.name}
    assert manifest.objects[-1] is manifest.service
    assert _prepare(own, service()).name != manifest.name


def test_a_long_name_still_fits() -> None:
    long = service()
    long["metadata"]["namespace"] = "x" * 63
    name = _prepare(long).name
    assert len(name) == 63
    assert "-rehearsal-" in name


def test_references_to_the_namespace_follow() -> None:
    policy = _object(
        "NetworkPolicy",
        "networking.k8s.io/v1",
        spec={
            "from": {"matchLabels": {"kubernetes.io/metadata.name": "images"}},
            "other": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}},
            "subjects": [{"name": "images", "namespace": "images"}],
            "namespaceSelector": {"matchNames": ["images", "other"]},
            "url": "http://redis.images.svc:6379/images.svc",
        },
    )
    manifest = _prepare(policy, service())
    new = manifest.name
    assert manifest.objects[-2]["spec"] == {
        "from": {"matchLabels": {"kubernetes.io/metadata.name": new}},
        "other": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}},
        "subjects": [{"name": "images", "namespace": new}],
        "namespaceSelector": {"matchNames": [new, "other"]},
        "url": f"http://redis.{new}.svc:6379/images.svc",
    }


def test_objects_that_act_beyond_the_namespace_are_only_checked() -> None:
    beyond = [
        _object("PrometheusRule", "monitoring.coreos.com/v1"),
        _object("HTTPRoute", "gateway.networking.k8s.io/v1"),
        _object("Ingress", "networking.k8s.io/v1"),
        _object("Service", spec={"type": "LoadBalancer"}),
    ]
    manifest = _prepare(*beyond, _object("Service", spec={}), service())
    assert [one["kind"] for one in manifest.only_checked] == [one["kind"] for one in beyond]
    assert "Service" in [one["kind"] for one in manifest.objects]


def test_the_key_that_is_made_is_let_in(tmp_path: Path) -> None:
    manifest = _prepare(service())
    path = tmp_path / "keys.yaml"
    path.write_text(_data(manifest, "api-keys")["keys.yaml"])
    assert list(_data(manifest, "api-keys")) == ["keys.yaml"]
    key = KeyRing(path, None).recognise(f"Bearer {manifest.key}")
    assert key is not None
    assert key.name == "rehearsal"


def test_secrets_of_the_overlay_are_taken_as_they_are() -> None:
    own = _object("Secret", stringData={"keys.yaml": "[]"})
    own["metadata"]["name"] = "api-keys"
    manifest = _prepare(own, service())
    assert manifest.made_secrets == ()
    assert manifest.key is None


def test_every_secret_of_the_production_overlay_is_made() -> None:
    manifest = _prepare(*render(ROOT / "cluster/overlays/production").documents)
    assert set(manifest.made_secrets) == {"api-keys", "ray-auth-token", "redis"}
    assert set(_data(manifest, "redis")) == {"password"}
    assert set(_data(manifest, "ray-auth-token")) == {"auth_token"}
    assert {one["kind"] for one in manifest.only_checked} == {"PodMonitor", "PrometheusRule"}


@pytest.mark.parametrize("overlay", ["local", "production", "single-gpu", "spot"])
def test_both_changes_differ_from_the_overlay_where_they_should(overlay: str) -> None:
    manifest = _prepare(*render(ROOT / "cluster/overlays" / overlay).documents)
    first, in_place, upgraded = (
        one["spec"] for one in (manifest.service, manifest.in_place, manifest.upgraded)
    )
    assert in_place["rayClusterConfig"] == first["rayClusterConfig"]
    before, after = (
        yaml.safe_load(first["serveConfigV2"]),
        yaml.safe_load(in_place["serveConfigV2"]),
    )
    deployment = after["applications"][0]["deployments"][0]
    assert deployment.pop("graceful_shutdown_wait_loop_s") == 2.5
    assert after == before
    assert upgraded["serveConfigV2"] == first["serveConfigV2"]
    assert upgraded["rayClusterConfig"] != first["rayClusterConfig"]


def test_pull_secrets_cannot_be_made() -> None:
    one = service()
    [group] = one["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    group["template"]["spec"]["imagePullSecrets"] = [{"name": "registry"}]
    assert _prepare(one).pull_secrets == ("registry",)


@pytest.mark.parametrize(
    ("overlay", "words"),
    [
        ([_object("ClusterRole"), service()], "whole cluster shares (ClusterRole x)"),
        ([service(), service()], "several RayServices"),
        (
            [_object("ConfigMap") | {"metadata": {"name": "x", "namespace": "other"}}, service()],
            "namespaces images, other",
        ),
        ([service(serveConfigV2="applications: [{name: x}]")], "nothing can be changed in place"),
    ],
)
def test_overlays_that_cannot_be_rehearsed_are_rejected(overlay: list[Object], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        _prepare(*overlay)
    assert words in str(raised.value)
