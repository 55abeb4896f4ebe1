"""Rules for a RayCluster's spec: autoscaler, worker groups, tokens, network."""

import re
from collections.abc import Iterator

from serve_app.doctor.operator_rules.rule import (
    RayCluster,
    Refusal,
    Rule,
    environment,
    mapping,
    mappings,
    number,
    version,
)

_V2_VARIABLE = "RAY_enable_autoscaler_v2"
_START_COMMAND = "KUBERAY_GEN_AUTOSCALER_START_CMD"
_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
_PRIORITY_SINCE, _TOKENS_SINCE, _KUBERNETES_TOKENS_SINCE = (2, 56, 0), (2, 52, 0), (2, 55, 0)

_WORD = r"[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?"
_DNS_LABEL = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
_LABEL_KEY = re.compile(
    rf"(?:(?=.{{1,253}}/){_DNS_LABEL}(?:\.{_DNS_LABEL})*/)?(?=.{{1,63}}$){_WORD}"
)
_LABEL_VALUE = re.compile(rf"(?=.{{0,63}}$)(?:{_WORD})?")


def pods_have_a_container(cluster: RayCluster) -> Iterator[Refusal]:
    for node in cluster.nodes:
        if not mappings(node.pod.get("containers")):
            yield Refusal(
                "pods_have_a_container",
                f"{node.pod_path}.containers",
                "has no container",
                "Give the pod template a container for Ray. A strategic merge of workerGroupSpecs "
                "replaces the whole list; patch it with JSON 6902.",
            )


def idle_timeout_of_a_group_needs_v2(cluster: RayCluster) -> Iterator[Refusal]:
    for group in cluster.groups:
        if group.spec.get("idleTimeoutSeconds") is not None and not _uses_v2(cluster):
            yield Refusal(
                "idle_timeout_of_a_group_needs_v2",
                f"{group.path}.idleTimeoutSeconds",
                f"is {group.spec['idleTimeoutSeconds']}, {_without_v2(cluster)}",
                _ask_for_v2(cluster),
            )


def priority_of_a_group_needs_v2(cluster: RayCluster) -> Iterator[Refusal]:
    for group in cluster.groups:
        if group.spec.get("priority") and not _uses_v2(cluster):
            yield Refusal(
                "priority_of_a_group_needs_v2",
                f"{group.path}.priority",
                f"is {group.spec['priority']}, {_without_v2(cluster)}",
                _ask_for_v2(cluster),
            )


def priority_of_a_group_needs_its_ray(cluster: RayCluster) -> Iterator[Refusal]:
    ray = cluster.spec.get("rayVersion")
    for group in cluster.groups:
        if group.spec.get("priority") and (version(ray) or ()) < _PRIORITY_SINCE:
            yield Refusal(
                "priority_of_a_group_needs_its_ray",
                f"{group.path}.priority",
                f"is {group.spec['priority']}, with rayVersion {ray}",
                f"Set {cluster.path}.rayVersion to the images' version, 2.56.0 or newer.",
            )


def _uses_v2(cluster: RayCluster) -> bool:
    return cluster.has_v2 or cluster.head.variables.get(_V2_VARIABLE) in ("1", "true")


def _without_v2(cluster: RayCluster) -> str:
    version = cluster.autoscaler.get("version", "not set")
    return (
        f"with enableInTreeAutoscaling {str(cluster.autoscaling).lower()} and "
        f"autoscalerOptions.version {version}"
    )


def _ask_for_v2(cluster: RayCluster) -> str:
    return (
        f"Set {cluster.path}.enableInTreeAutoscaling to true and "
        f"{cluster.path}.autoscalerOptions.version to v2. Ray's own default does not count."
    )


def v2_is_requested_in_one_place(cluster: RayCluster) -> Iterator[Refusal]:
    """Reject a variable of the head beside the autoscaler's version, or without an autoscaler."""
    value = cluster.head.variables.get(_V2_VARIABLE)
    beside = cluster.autoscaling and cluster.autoscaler.get("version") is not None
    alone = not cluster.autoscaling and value in ("1", "true")
    if value is not None and (beside or alone):
        yield Refusal(
            "v2_is_requested_in_one_place",
            f"{cluster.head.variables_path}.{_V2_VARIABLE}",
            f"is set {'beside autoscalerOptions.version' if beside else 'with no autoscaler'}",
            f"Remove the variable, and use {cluster.path}.autoscalerOptions.version.",
        )


def v2_restarts_no_pod(cluster: RayCluster) -> Iterator[Refusal]:
    for node in cluster.nodes if cluster.has_v2 else []:
        if (policy := node.pod.get("restartPolicy") or "Never") != "Never":
            yield Refusal(
                "v2_restarts_no_pod",
                f"{node.pod_path}.restartPolicy",
                f"is {policy}, with the autoscaler v2",
                "Leave restartPolicy out: KubeRay replaces a pod that has ended.",
            )


def a_fixed_size_has_both_bounds(cluster: RayCluster) -> Iterator[Refusal]:
    """Require both bounds. A CRD of 1.7.0 fills in 0 and no upper bound before the operator."""
    for group in [] if cluster.autoscaling else cluster.groups:
        for field in ("minReplicas", "maxReplicas"):
            if group.spec.get(field) is None:
                yield Refusal(
                    "a_fixed_size_has_both_bounds",
                    f"{group.path}.{field}",
                    "is not set, and the autoscaler is off",
                    f"Set {field}, or turn on {cluster.path}.enableInTreeAutoscaling.",
                )


def bounds_are_not_negative(cluster: RayCluster) -> Iterator[Refusal]:
    for group in cluster.groups:
        for field in ("minReplicas", "maxReplicas"):
            if (number(group.spec.get(field)) or 0) < 0:
                yield Refusal(
                    "bounds_are_not_negative",
                    f"{group.path}.{field}",
                    f"is {group.spec[field]}",
                    f"Set {field} to 0 or more.",
                )


def min_is_at_most_max(cluster: RayCluster) -> Iterator[Refusal]:
    for group in cluster.groups:
        least, most = number(group.spec.get("minReplicas")), number(group.spec.get("maxReplicas"))
        if least is not None and most is not None and max(least, 0) > most >= 0:
            yield Refusal(
                "min_is_at_most_max",
                f"{group.path}.minReplicas",
                f"is {least}, over maxReplicas, {most}",
                "Raise maxReplicas or lower minReplicas.",
            )


def suspend_excludes_the_autoscaler(cluster: RayCluster) -> Iterator[Refusal]:
    for group in cluster.groups if cluster.autoscaling else []:
        if group.spec.get("suspend") is True:
            yield Refusal(
                "suspend_excludes_the_autoscaler",
                f"{group.path}.suspend",
                "is true, with the autoscaler on",
                "Leave suspend out, and set minReplicas and maxReplicas to 0 instead.",
            )


def resources_are_given_once(cluster: RayCluster) -> Iterator[Refusal]:
    """Reject a node with both ``resources`` and the same start parameters of Ray."""
    for node in cluster.nodes:
        given = [name for name in _RESOURCES if node.start_params.get(name)]
        if node.spec.get("resources") and given:
            yield Refusal(
                "resources_are_given_once",
                f"{node.path}.resources",
                f"is set beside rayStartParams {', '.join(given)}",
                "Keep one of the two.",
            )


def labels_are_no_start_parameter(cluster: RayCluster) -> Iterator[Refusal]:
    for node in cluster.nodes:
        if "labels" in node.start_params:
            yield Refusal(
                "labels_are_no_start_parameter",
                f"{node.path}.rayStartParams.labels",
                "is set",
                f"Move the labels to {node.path}.labels.",
            )


def labels_are_kubernetes_labels(cluster: RayCluster) -> Iterator[Refusal]:
    for node in cluster.nodes:
        for key, value in mapping(node.spec.get("labels")).items():
            if not (_LABEL_KEY.fullmatch(str(key)) and _LABEL_VALUE.fullmatch(str(value))):
                yield Refusal(
                    "labels_are_kubernetes_labels",
                    f"{node.path}.labels",
                    f"has {key}: {value!r}, which is not a Kubernetes label",
                    "Use letters, digits, '-', '_' and '.', at most 63 in a name or a value.",
                )


def idle_timeouts_are_not_negative(cluster: RayCluster) -> Iterator[Refusal]:
    fields = [(f"{cluster.path}.autoscalerOptions", cluster.autoscaler)]
    fields += [(group.path, group.spec) for group in cluster.groups]
    for path, spec in fields:
        if (seconds := number(spec.get("idleTimeoutSeconds")) or 0) < 0:
            yield Refusal(
                "idle_timeouts_are_not_negative",
                f"{path}.idleTimeoutSeconds",
                f"is {seconds}",
                "Set idleTimeoutSeconds to 0 or more.",
            )


def the_start_command_is_kuberays(cluster: RayCluster) -> Iterator[Refusal]:
    if _START_COMMAND in environment(cluster.autoscaler.get("env")):
        yield Refusal(
            "the_start_command_is_kuberays",
            f"{cluster.path}.autoscalerOptions.env.{_START_COMMAND}",
            "is set, and KubeRay sets it itself",
            "Remove the variable; args may refer to it.",
        )


def tokens_need_their_ray(cluster: RayCluster) -> Iterator[Refusal]:
    ray = cluster.spec.get("rayVersion")
    mode = mapping(cluster.spec.get("authOptions")).get("mode")
    if mode == "token" and (version(ray) or ()) < _TOKENS_SINCE:
        yield Refusal(
            "tokens_need_their_ray",
            f"{cluster.path}.authOptions.mode",
            f"is token, with rayVersion {ray}",
            f"Set {cluster.path}.rayVersion to the images' version, 2.52.0 or newer.",
        )


def kubernetes_tokens_need_their_ray(cluster: RayCluster) -> Iterator[Refusal]:
    """Require a Ray with Kubernetes tokens, and the mode that uses tokens."""
    options, ray = mapping(cluster.spec.get("authOptions")), cluster.spec.get("rayVersion")
    if options.get("enableK8sTokenAuth") is not True:
        return
    field = f"{cluster.path}.authOptions.enableK8sTokenAuth"
    if options.get("mode") != "token":
        yield Refusal(
            "kubernetes_tokens_need_their_ray",
            field,
            f"is true, with mode {options.get('mode', 'not set')}",
            f"Set {cluster.path}.authOptions.mode to token, or leave both out.",
        )
    elif _TOKENS_SINCE <= (version(ray) or ()) < _KUBERNETES_TOKENS_SINCE:
        yield Refusal(
            "kubernetes_tokens_need_their_ray",
            field,
            f"is true, with rayVersion {ray}",
            f"Set {cluster.path}.rayVersion to the images' version, 2.55.0 or newer.",
        )


def kubernetes_tokens_exclude_a_secret(cluster: RayCluster) -> Iterator[Refusal]:
    options = mapping(cluster.spec.get("authOptions"))
    if options.get("enableK8sTokenAuth") is True and options.get("secretName"):
        yield Refusal(
            "kubernetes_tokens_exclude_a_secret",
            f"{cluster.path}.authOptions.secretName",
            f"is {options['secretName']}, beside enableK8sTokenAuth",
            "Keep one of the two.",
        )


def feature_gates_are_on(cluster: RayCluster) -> Iterator[Refusal]:
    """Require the gates of fields that are off by default; rules behind a gate are not checked."""
    backend = (cluster.fault_tolerance or {}).get("backend")
    for field, used, gate in (
        ("networkPolicy", cluster.spec.get("networkPolicy"), "RayClusterNetworkPolicy"),
        ("tlsOptions", cluster.spec.get("tlsOptions"), "RayClusterMTLS"),
        (
            "historyServerOptions",
            cluster.spec.get("historyServerOptions"),
            "RayClusterHistoryServer",
        ),
        (
            "gcsFaultToleranceOptions.backend",
            "rocksdb" if backend == "rocksdb" else None,
            "GCSFaultToleranceEmbeddedStorage",
        ),
    ):
        if used is not None and gate not in cluster.gates:
            yield Refusal(
                "feature_gates_are_on",
                f"{cluster.path}.{field}",
                f"is set, and the operator's feature gate {gate} is off by default",
                f"Leave {field} out, or turn the gate on in cluster/platform/kuberay-operator.yaml "
                "(featureGates) and upgrade the operator first.",
            )


def a_network_policy_needs_dns_names(cluster: RayCluster) -> Iterator[Refusal]:
    for group in cluster.groups if cluster.spec.get("networkPolicy") is not None else []:
        name = str(group.spec.get("groupName"))
        if not re.fullmatch(rf"(?=.{{1,63}}$){_DNS_LABEL}", name):
            yield Refusal(
                "a_network_policy_needs_dns_names",
                f"{group.path}.groupName",
                f"is {name}, which is not a DNS-1123 label, with networkPolicy",
                "Use lower-case letters, digits and '-', at most 63.",
            )


RULES: list[Rule] = [
    pods_have_a_container,
    idle_timeout_of_a_group_needs_v2,
    priority_of_a_group_needs_v2,
    priority_of_a_group_needs_its_ray,
    v2_is_requested_in_one_place,
    v2_restarts_no_pod,
    a_fixed_size_has_both_bounds,
    bounds_are_not_negative,
    min_is_at_most_max,
    suspend_excludes_the_autoscaler,
    resources_are_given_once,
    labels_are_no_start_parameter,
    labels_are_kubernetes_labels,
    idle_timeouts_are_not_negative,
    the_start_command_is_kuberays,
    tokens_need_their_ray,
    kubernetes_tokens_need_their_ray,
    kubernetes_tokens_exclude_a_secret,
    feature_gates_are_on,
    a_network_policy_needs_dns_names,
]
