"""Secrets that must exist before any pod starts."""

import re
from pathlib import Path

import pytest

from serve_app.doctor.cluster import look
from serve_app.doctor.kube import Cluster
from serve_app.doctor.report import Finding
from serve_app.doctor.secrets import Reference, references
from tests.cluster.manifests import render
from tests.doctor.fake_cluster import FakeApi, Object, secret, service
from tests.doctor.test_cluster import ROOT
from tests.pages import KUBERNETES, section


def _look(kubeconfig: Path, overlay: list[Object] | None = None) -> dict[str, Finding]:
    with Cluster(None, kubeconfig) as cluster:
        return {finding.check: finding for finding in look(cluster, False, overlay)}


def _with(**pod: object) -> Object:
    return service(pod=pod)


def _env(name: str, key: str, **more: bool) -> Object:
    source = {"valueFrom": {"secretKeyRef": {"name": name, "key": key} | more}}
    gpu = {"limits": {"nvidia.com/gpu": 1}}
    return {"containers": [{"name": "w", "env": [{"name": "X"} | source], "resources": gpu}]}


def _needed(*objects: Object) -> set[tuple[str, str | None]]:
    return {(one.secret, one.key) for one in references(objects)}


def _overlay(name: str) -> list[Object]:
    return render(ROOT / "cluster" / "overlays" / name).documents


def test_production_requires_the_documented_secrets() -> None:
    page = section(ROOT, KUBERNETES, "Secrets")
    rows = re.findall(r"^\| `([\w-]+)` \| (.+?) \| .+ \| (.+?) \|$", page, re.MULTILINE)
    listed = {
        (name, key)
        for name, keys, _ in rows
        for key in re.findall(r"`([\w.]+)`", keys)
        if name not in ("hugging-face", "diffusion-serve-tls")  # optional; of ingress
    }
    assert listed == {(name, key) for name, key in _needed(*_overlay("production")) if key}
    assert _needed(*_overlay("local")) == set()


def test_the_ingress_requires_its_certificate() -> None:
    listener = {"tls": {"certificateRefs": [{"name": "tls"}, {"kind": "Other", "name": "x"}]}}
    one = {"kind": "Gateway", "metadata": {"name": "g"}, "spec": {"listeners": [listener]}}
    assert _needed(one) == {("tls", "tls.crt"), ("tls", "tls.key")}


@pytest.mark.parametrize(
    ("pod", "needed"),
    [
        (_env("a", "k"), {("a", "k")}),
        (_env("a", "k", optional=True), set()),
        ({"containers": [{"name": "w", "envFrom": [{"secretRef": {"name": "a"}}]}]}, {("a", None)}),
        ({"initContainers": _env("a", "k")["containers"]}, {("a", "k")}),
        ({"volumes": [{"name": "v", "secret": {"secretName": "a"}}]}, {("a", None)}),
        ({"volumes": [{"name": "v", "secret": {"secretName": "a", "optional": True}}]}, set()),
        (
            {
                "volumes": [
                    {"name": "v", "secret": {"secretName": "a", "items": [{"key": "k"}]}},
                    {"name": "p", "projected": {"sources": [{"secret": {"name": "b"}}]}},
                ]
            },
            {("a", "k"), ("b", None)},
        ),
        ({"imagePullSecrets": [{"name": "a"}]}, {("a", None)}),
    ],
)
def test_pods_name_secrets_in_many_ways(pod: Object, needed: set[tuple[str, str | None]]) -> None:
    assert _needed(_with(**pod)) == needed
    workload = {
        "kind": "StatefulSet",
        "metadata": {"name": "s"},
        "spec": {"template": {"spec": pod}},
    }
    assert _needed(workload) == needed


def test_references_name_the_objects_that_require_them() -> None:
    assert references([_with(**_env("a", "k"))]) == [Reference("a", "k", "the pods of sdxl gpu")]


def test_a_key_that_is_missing_is_added_and_no_value_is_shown(
    api: FakeApi, kubeconfig: Path
) -> None:
    api.put("secrets", secret("redis", "pass"))
    finding = _look(kubeconfig, [_with(**_env("redis", "password"))])["Secret redis"]
    assert finding.outcome == "failed"
    assert finding.found == (
        "without the key password, which the pods of sdxl gpu need (it has pass)"
    )
    assert "--dry-run=client --output yaml | kubectl apply" in finding.advice
    assert "aGlkZGVu" not in str(finding)
    assert "hidden" not in str(finding)


def test_a_secret_of_ones_own_is_made_with_the_keys_that_are_needed(
    api: FakeApi, kubeconfig: Path
) -> None:
    finding = _look(kubeconfig, [_with(**_env("mine", "k"))])["Secret mine"]
    assert finding.advice == (
        "Create it:\n  kubectl -n images create secret generic mine --from-literal=k=…"
    )


def test_the_key_of_prometheus_is_added_to_those_of_the_api(api: FakeApi, kubeconfig: Path) -> None:
    with Cluster("diffusion-serve", kubeconfig) as cluster:
        findings = list(look(cluster, False, _overlay("production")))
    advices = [finding.advice for finding in findings if finding.check.startswith("Secret ")]
    assert "--from-file=keys.yaml" in advices[0]  # it is there by then
    [prometheus] = [advice for advice in advices if "prometheus-api-key" in advice]
    read, key, write, last = prometheus.replace(" \\\n", "").splitlines()[1:]
    assert """go-template='{{index .data "keys.yaml" | base64decode}}' > keys.yaml""" in read
    assert key.split("#")[0].strip() == "diffusion-serve key prometheus >> keys.yaml"
    assert "create secret generic api-keys --from-file=keys.yaml" in write
    assert write.endswith("| kubectl apply --server-side --force-conflicts --filename -")
    assert last.endswith("prometheus-api-key --from-literal=key=sk-…")


def test_each_secret_is_read_by_name_and_optional_ones_are_not(
    api: FakeApi, kubeconfig: Path
) -> None:
    api.put("secrets", secret("a", "k"))
    api.put("rayservices.ray.io", _with(**_env("a", "k")))
    assert _look(kubeconfig)["Secrets"].found == "a: there, with the needed keys"
    api.put("rayservices.ray.io", _with(**_env("b", "k", optional=True)))
    assert "Secrets" not in _look(kubeconfig)
    assert [path for path in api.asked if "secrets" in path] == [
        "/api/v1/namespaces/images/secrets/a"
    ]


def test_secrets_that_may_not_be_read_are_named_with_the_least_that_is_to_be_granted(
    api: FakeApi, kubeconfig: Path
) -> None:
    api.refusals = {"secrets": 403}
    second = {"kind": "StatefulSet", "metadata": {"name": "s"}}
    second["spec"] = {"template": {"spec": _env("redis", "password")}}
    findings = _look(kubeconfig, [_with(**_env("a", "k")), second])
    finding = findings["Secrets"]
    assert finding.outcome == "warning"
    assert "kubectl -n images get secret a redis\n" in finding.advice
    assert "--verb=get --resource=secrets --resource-name=a --resource-name=redis" in finding.advice
    assert "--user=jane" in finding.advice
    assert "failed" not in {one.outcome for one in findings.values()}


@pytest.mark.parametrize(
    ("coming", "outcome"),
    [
        ({"kind": "Secret", "metadata": {"name": "a"}, "stringData": {"k": "x"}}, "ok"),
        ({"kind": "SealedSecret", "metadata": {"name": "a"}}, "ok"),
        (
            {
                "kind": "ExternalSecret",
                "metadata": {"name": "e"},
                "spec": {"target": {"name": "a"}},
            },
            "ok",
        ),
        ({"kind": "Certificate", "metadata": {"name": "c"}, "spec": {"secretName": "a"}}, "ok"),
        ({"kind": "Secret", "metadata": {"name": "a"}, "data": {"other": "eA=="}}, "failed"),
    ],
)
def test_a_secret_may_come_with_the_overlay(
    api: FakeApi, kubeconfig: Path, coming: Object, outcome: str
) -> None:
    findings = _look(kubeconfig, [_with(**_env("a", "k")), coming])
    finding = findings.get("Secret a") or findings["Secrets"]
    assert finding.outcome == outcome
