"""Each rule of KubeRay's operator, broken once in the RayService of a rendered overlay."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from serve_app.doctor.operator_rules import RULES, refusals
from tests.cluster.manifests import render

ROOT = Path(__file__).parents[2]
Object = dict[str, Any]

REMOVED = object()
C = "/spec/rayClusterConfig"
HEAD = f"{C}/headGroupSpec"
GROUP = f"{C}/workerGroupSpecs/0"
HEAD_POD, POD = f"{HEAD}/template/spec", f"{GROUP}/template/spec"
OPTIONS = "/spec/upgradeStrategy/clusterUpgradeOptions"

NO_AUTOSCALER = {
    f"{C}/enableInTreeAutoscaling": False,
    f"{GROUP}/idleTimeoutSeconds": REMOVED,
    "/spec/upgradeStrategy": REMOVED,
}
NO_FAULT_TOLERANCE = {f"{C}/gcsFaultToleranceOptions": REMOVED}
ROCKSDB = {f"{C}/gcsFaultToleranceOptions": {"backend": "rocksdb"}}


@dataclass(frozen=True)
class Mutation:
    """Edits of the overlay `production`, by JSON pointer, that break one rule."""

    rule: str
    edits: dict[str, Any]
    gates: frozenset[str] = field(default_factory=frozenset)
    kind: str = "RayService"
    """RayCluster: its rayClusterConfig alone, to which the pointers still lead."""


def variable(name: str, value: str = "1") -> dict[str, str]:
    return {"name": name, "value": value}


MUTATIONS = [
    Mutation("pods_have_a_container", {f"{HEAD_POD}/containers": []}),
    Mutation("pods_have_a_container", {f"{GROUP}/template": REMOVED}),
    Mutation("idle_timeout_of_a_group_needs_v2", {f"{C}/autoscalerOptions/version": REMOVED}),
    Mutation("idle_timeout_of_a_group_needs_v2", {f"{C}/autoscalerOptions/version": "v1"}),
    Mutation(
        "idle_timeout_of_a_group_needs_v2", NO_AUTOSCALER | {f"{GROUP}/idleTimeoutSeconds": 120}
    ),
    Mutation("priority_of_a_group_needs_v2", NO_AUTOSCALER | {f"{GROUP}/priority": 10}),
    Mutation(
        "priority_of_a_group_needs_its_ray",
        {f"{GROUP}/priority": 10, f"{C}/rayVersion": "2.55.9"},
    ),
    Mutation(
        "v2_is_requested_in_one_place",
        {f"{HEAD_POD}/containers/0/env/-": variable("RAY_enable_autoscaler_v2")},
    ),
    Mutation(
        "v2_is_requested_in_one_place",
        NO_AUTOSCALER
        | {f"{HEAD_POD}/containers/0/env/-": variable("RAY_enable_autoscaler_v2", "true")},
    ),
    Mutation("v2_restarts_no_pod", {f"{HEAD_POD}/restartPolicy": "OnFailure"}),
    Mutation("v2_restarts_no_pod", {f"{POD}/restartPolicy": "Always"}),
    Mutation("a_fixed_size_has_both_bounds", NO_AUTOSCALER | {f"{GROUP}/maxReplicas": REMOVED}),
    Mutation("a_fixed_size_has_both_bounds", NO_AUTOSCALER | {f"{GROUP}/minReplicas": REMOVED}),
    Mutation("bounds_are_not_negative", {f"{GROUP}/minReplicas": -1}),
    Mutation("bounds_are_not_negative", {f"{GROUP}/maxReplicas": -1}),
    Mutation("min_is_at_most_max", {f"{GROUP}/minReplicas": 5}),
    Mutation("suspend_excludes_the_autoscaler", {f"{GROUP}/suspend": True}),
    Mutation(
        "resources_are_given_once",
        {f"{GROUP}/resources": {"GPU": "1"}, f"{GROUP}/rayStartParams/num-gpus": "1"},
    ),
    Mutation("resources_are_given_once", {f"{HEAD}/resources": {"CPU": "0"}}),
    Mutation("labels_are_no_start_parameter", {f"{GROUP}/rayStartParams/labels": "a=b"}),
    Mutation("labels_are_no_start_parameter", {f"{HEAD}/rayStartParams/labels": ""}),
    Mutation("labels_are_kubernetes_labels", {f"{GROUP}/labels": {"gateway/": "no"}}),
    Mutation("labels_are_kubernetes_labels", {f"{GROUP}/labels": {"gateway": "not here"}}),
    Mutation("labels_are_kubernetes_labels", {f"{HEAD}/labels": {"x" * 64: "y"}}),
    Mutation("idle_timeouts_are_not_negative", {f"{C}/autoscalerOptions/idleTimeoutSeconds": -1}),
    Mutation("idle_timeouts_are_not_negative", {f"{GROUP}/idleTimeoutSeconds": -120}),
    Mutation(
        "the_start_command_is_kuberays",
        {f"{C}/autoscalerOptions/env/-": variable("KUBERAY_GEN_AUTOSCALER_START_CMD")},
    ),
    Mutation("tokens_need_their_ray", {f"{C}/rayVersion": "2.51.1"}),
    Mutation("tokens_need_their_ray", {f"{C}/rayVersion": REMOVED}),
    Mutation("tokens_need_their_ray", {f"{C}/rayVersion": "nightly"}),
    Mutation(
        "kubernetes_tokens_need_their_ray",
        {
            f"{C}/authOptions": {"mode": "token", "enableK8sTokenAuth": True},
            f"{C}/rayVersion": "2.54.0",
        },
        kind="RayCluster",
    ),
    Mutation(
        "kubernetes_tokens_need_their_ray",
        {f"{C}/authOptions": {"mode": "disabled", "enableK8sTokenAuth": True}},
        kind="RayCluster",
    ),
    Mutation(
        "kubernetes_tokens_exclude_a_secret",
        {f"{C}/authOptions/enableK8sTokenAuth": True},
        kind="RayCluster",
    ),
    Mutation("feature_gates_are_on", {f"{C}/networkPolicy": {"mode": "DenyAll"}}),
    Mutation("feature_gates_are_on", {f"{C}/tlsOptions": {"enabled": True}}),
    Mutation("feature_gates_are_on", {f"{C}/historyServerOptions": {"collectorOptions": {}}}),
    Mutation("feature_gates_are_on", ROCKSDB),
    Mutation(
        "a_network_policy_needs_dns_names",
        {f"{C}/networkPolicy": {}, f"{GROUP}/groupName": "GPU"},
        frozenset({"RayClusterNetworkPolicy"}),
    ),
    Mutation(
        "fault_tolerance_is_requested_in_one_place",
        {"/metadata/annotations/ray.io~1ft-enabled": "true"},
    ),
    Mutation(
        "the_redis_password_is_an_option", {f"{HEAD}/rayStartParams/redis-password": "hunter2"}
    ),
    Mutation(
        "the_redis_password_is_an_option",
        {f"{HEAD_POD}/containers/0/env/-": variable("REDIS_PASSWORD")},
    ),
    Mutation(
        "the_redis_address_is_an_option",
        {f"{HEAD_POD}/containers/0/env/-": variable("RAY_REDIS_ADDRESS", "redis:6379")},
    ),
    Mutation(
        "the_redis_address_is_an_option",
        NO_FAULT_TOLERANCE
        | {f"{HEAD_POD}/containers/0/env/-": variable("RAY_REDIS_ADDRESS", "redis:6379")},
    ),
    Mutation(
        "the_storage_namespace_is_an_option",
        {"/metadata/annotations/ray.io~1external-storage-namespace": "ours"},
    ),
    Mutation("the_redis_user_is_an_option", {f"{HEAD}/rayStartParams/redis-username": "ray"}),
    Mutation(
        "the_redis_user_is_an_option",
        NO_FAULT_TOLERANCE | {f"{HEAD_POD}/containers/0/env/-": variable("REDIS_USERNAME")},
    ),
    Mutation(
        "rocksdb_needs_no_redis",
        {
            f"{C}/gcsFaultToleranceOptions/redisPassword": REMOVED,
            f"{C}/gcsFaultToleranceOptions/backend": "rocksdb",
        },
        frozenset({"GCSFaultToleranceEmbeddedStorage"}),
    ),
    Mutation("storage_is_for_rocksdb", {f"{C}/gcsFaultToleranceOptions/storage": {"size": "1Gi"}}),
    Mutation("the_name_is_a_dns_label", {"/metadata/name": "2-sdxl"}),
    Mutation("the_name_leaves_room", {"/metadata/name": "s" * 48}),
    *[
        Mutation(
            "the_timeout_is_a_duration",
            {"/metadata/annotations/ray.io~1initializing-timeout": text},
        )
        for text in ("6 hours", "-5m", "0", "0s", "6d")
    ],
    Mutation(
        "tokens_are_not_kubernetes",
        {f"{C}/authOptions": {"mode": "token", "enableK8sTokenAuth": True}},
    ),
    Mutation("the_head_service_has_no_name", {f"{HEAD}/headService": {"metadata": {"name": "h"}}}),
    Mutation("the_upgrade_is_the_services", {f"{C}/upgradeStrategy": {"type": "Recreate"}}),
    Mutation("the_upgrade_type_is_known", {"/spec/upgradeStrategy/type": "RollingUpdate"}),
    Mutation("the_deletion_delay_is_not_negative", {"/spec/rayClusterDeletionDelaySeconds": -1}),
    Mutation(
        "incremental_upgrades_need_the_autoscaler",
        {f"{C}/enableInTreeAutoscaling": False, f"{GROUP}/idleTimeoutSeconds": REMOVED},
    ),
    Mutation("incremental_upgrades_need_their_options", {OPTIONS: REMOVED}),
    Mutation("surge_and_step_are_percentages", {f"{OPTIONS}/maxSurgePercent": 101}),
    Mutation("surge_and_step_are_percentages", {f"{OPTIONS}/stepSizePercent": -1}),
    Mutation("surge_and_step_are_percentages", {f"{OPTIONS}/stepSizePercent": REMOVED}),
    Mutation("a_step_is_at_most_the_surge", {f"{OPTIONS}/stepSizePercent": 51}),
    Mutation("the_interval_is_positive", {f"{OPTIONS}/intervalSeconds": 0}),
    Mutation("the_interval_is_positive", {f"{OPTIONS}/intervalSeconds": REMOVED}),
    Mutation("the_gateway_class_is_named", {f"{OPTIONS}/gatewayClassName": ""}),
]


@cache
def _production() -> Object:
    return render(ROOT / "cluster/overlays/production").service


def mutated(mutation: Mutation) -> Object:
    service = deepcopy(_production())
    for pointer, value in mutation.edits.items():
        *parents, last = [part.replace("~1", "/") for part in pointer.split("/")[1:]]
        node: Any = service
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node[part]
        if value is REMOVED:
            del node[last]
        elif last == "-":
            node.append(value)
        else:
            node[last] = value
    if mutation.kind == "RayCluster":
        service = service | {"kind": "RayCluster", "spec": service["spec"]["rayClusterConfig"]}
    return service


def test_the_overlay_itself_is_accepted() -> None:
    assert list(refusals(_production())) == []
    assert list(refusals(mutated(Mutation("", {}, kind="RayCluster")))) == []


@pytest.mark.parametrize("edits", [NO_AUTOSCALER, NO_FAULT_TOLERANCE])
def test_the_unmutated_manifest_is_accepted(edits: dict[str, Any]) -> None:
    assert list(refusals(mutated(Mutation("", edits)))) == []


@pytest.mark.parametrize(
    ("edits", "gates"),
    [
        ({f"{C}/networkPolicy": {}}, {"RayClusterNetworkPolicy"}),
        (ROCKSDB, {"GCSFaultToleranceEmbeddedStorage"}),
        ({f"{C}/gcsFaultToleranceOptions/backend": REMOVED}, set()),
        ({f"{GROUP}/priority": 10}, set()),
        ({f"{POD}/restartPolicy": "Never", f"{HEAD_POD}/restartPolicy": "Never"}, set()),
        ({f"{GROUP}/labels": {"example.com/gateway": "no", "empty": ""}}, set()),
        ({"/metadata/annotations/ray.io~1initializing-timeout": "1h30m0.5s"}, set()),
        ({"/metadata/annotations/ray.io~1initializing-timeout": "21600"}, set()),
        ({f"{OPTIONS}/maxSurgePercent": REMOVED}, set()),
        ({"/spec/upgradeStrategy": {"type": "NewCluster"}}, set()),
    ],
)
def test_documents_that_the_operator_accepts_are_accepted(
    edits: dict[str, Any], gates: set[str]
) -> None:
    assert list(refusals(mutated(Mutation("", edits)), gates)) == []


@pytest.mark.parametrize(
    "mutation", MUTATIONS, ids=[f"{i:02}-{one.rule}" for i, one in enumerate(MUTATIONS, start=1)]
)
def test_a_mutation_breaks_its_rule_and_no_other(mutation: Mutation) -> None:
    found = list(refusals(mutated(mutation), mutation.gates))
    assert [refusal.rule for refusal in found] == [mutation.rule]
    assert found[0].advice


def test_every_rule_has_a_mutation() -> None:
    names = [rule.__name__ for rule in RULES]
    assert len(set(names)) == len(names)
    assert set(names) == {mutation.rule for mutation in MUTATIONS}
    print(f"operator: {len(names)} rules, {len(MUTATIONS)} mutations, each caught by its rule")


def test_the_number_of_rules_is_documented() -> None:
    text = " ".join((ROOT / "docs/operate/doctor.md").read_text().split())
    assert (
        f"the {len(RULES)} rules of KubeRay's operator 1.7.0 (`serve_app/doctor/operator_rules`)"
        in text
    )


def test_malformed_documents_do_not_break_the_rules() -> None:
    """Run every rule on malformed values: none may raise."""
    for path in _paths(_production()["spec"]):
        for odd in (None, 3, -1, "x", [], [None], {}, {"x": 1}):
            document = deepcopy(_production())
            node = document["spec"]
            for part in path[:-1]:
                node = node[part]
            node[path[-1]] = odd
            for refusal in refusals(document):
                assert refusal.found, path


def _paths(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, child in items:
        yield (*path, key)
        if isinstance(child, dict | list):
            yield from _paths(child, (*path, key))
