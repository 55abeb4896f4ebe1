"""Rules for a RayService around its RayCluster."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from serve_app.doctor.kube import Object
from serve_app.doctor.operator_rules.rule import Refusal, ServiceRule, mapping, number

_MOST_NAME_CHARS = 47
"""63 characters of a Service's name, less KubeRay's additions: six, and ``-serve-svc``."""

_TIMEOUT = "ray.io/initializing-timeout"
_INCREMENTAL = "NewClusterWithIncrementalUpgrade"
_TYPES = (_INCREMENTAL, "NewCluster", "None")
_CLUSTER = "spec.rayClusterConfig"
_OPTIONS = "spec.upgradeStrategy.clusterUpgradeOptions"

_AMOUNT = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_DURATION = re.compile(rf"[+-]?(?:0|(?:{_AMOUNT}(?:ns|us|µs|μs|ms|s|m|h))+)")


def _cluster(service: Object) -> Mapping[str, Any]:
    return mapping(mapping(service.get("spec")).get("rayClusterConfig"))


def _upgrade(service: Object) -> Mapping[str, Any]:
    return mapping(mapping(service.get("spec")).get("upgradeStrategy"))


def _incremental_options(service: Object) -> Mapping[str, Any] | None:
    """Return the options of an incremental upgrade; None for another, or without options."""
    options = _upgrade(service).get("clusterUpgradeOptions")
    if _upgrade(service).get("type") != _INCREMENTAL or options is None:
        return None
    return mapping(options)


def the_name_is_a_dns_label(service: Object) -> Iterator[Refusal]:
    name = str(service["metadata"].get("name"))
    if not re.fullmatch("[a-z](?:[-a-z0-9]*[a-z0-9])?", name):
        yield Refusal(
            "the_name_is_a_dns_label",
            "metadata.name",
            f"is {name}, which is not a DNS-1035 label",
            "Use lower-case letters, digits and '-', with a letter first.",
        )


def the_name_leaves_room(service: Object) -> Iterator[Refusal]:
    if (length := len(str(service["metadata"].get("name")))) > _MOST_NAME_CHARS:
        yield Refusal(
            "the_name_leaves_room",
            "metadata.name",
            f"has {length} characters",
            f"Use at most {_MOST_NAME_CHARS}: KubeRay adds to it for clusters and Services.",
        )


def the_timeout_is_a_duration(service: Object) -> Iterator[Refusal]:
    text = str(mapping(service["metadata"].get("annotations")).get(_TIMEOUT, ""))
    is_time = _DURATION.fullmatch(text) or re.fullmatch("[+-]?[0-9]+", text)
    if text and not (is_time and re.search("[1-9]", text) and not text.startswith("-")):
        yield Refusal(
            "the_timeout_is_a_duration",
            f"metadata.annotations.{_TIMEOUT}",
            f"is {text}",
            "Write a positive duration such as 30m or 6h, or a number of seconds.",
        )


def tokens_are_not_kubernetes(service: Object) -> Iterator[Refusal]:
    if mapping(_cluster(service).get("authOptions")).get("enableK8sTokenAuth") is True:
        yield Refusal(
            "tokens_are_not_kubernetes",
            f"{_CLUSTER}.authOptions.enableK8sTokenAuth",
            "is true, which a RayService does not support",
            "Leave it out, and name a Secret with the token in secretName.",
        )


def the_head_service_has_no_name(service: Object) -> Iterator[Refusal]:
    head = mapping(_cluster(service).get("headGroupSpec"))
    name = mapping(mapping(head.get("headService")).get("metadata")).get("name")
    if name:
        yield Refusal(
            "the_head_service_has_no_name",
            f"{_CLUSTER}.headGroupSpec.headService.metadata.name",
            f"is {name}",
            "Leave the name out: KubeRay names the Service after the RayService.",
        )


def the_upgrade_is_the_services(service: Object) -> Iterator[Refusal]:
    strategy = mapping(_cluster(service).get("upgradeStrategy"))
    if strategy.get("type") is not None:
        yield Refusal(
            "the_upgrade_is_the_services",
            f"{_CLUSTER}.upgradeStrategy.type",
            f"is {strategy['type']}",
            "Remove it: a RayService upgrades its clusters by spec.upgradeStrategy.",
        )


def the_upgrade_type_is_known(service: Object) -> Iterator[Refusal]:
    kind = _upgrade(service).get("type")
    if kind is not None and kind not in _TYPES:
        yield Refusal(
            "the_upgrade_type_is_known",
            "spec.upgradeStrategy.type",
            f"is {kind}",
            f"Write one of {', '.join(_TYPES)}.",
        )


def the_deletion_delay_is_not_negative(service: Object) -> Iterator[Refusal]:
    field = "rayClusterDeletionDelaySeconds"
    if (seconds := number(mapping(service.get("spec")).get(field)) or 0) < 0:
        yield Refusal(
            "the_deletion_delay_is_not_negative",
            f"spec.{field}",
            f"is {seconds}",
            f"Set {field} to 0 or more.",
        )


def incremental_upgrades_need_the_autoscaler(service: Object) -> Iterator[Refusal]:
    if (
        _upgrade(service).get("type") == _INCREMENTAL
        and _cluster(service).get("enableInTreeAutoscaling") is not True
    ):
        yield Refusal(
            "incremental_upgrades_need_the_autoscaler",
            f"{_CLUSTER}.enableInTreeAutoscaling",
            f"is not true, with upgradeStrategy.type {_INCREMENTAL}",
            "Turn the autoscaler on, or set upgradeStrategy.type to NewCluster.",
        )


def incremental_upgrades_need_their_options(service: Object) -> Iterator[Refusal]:
    if _upgrade(service).get("type") == _INCREMENTAL and _incremental_options(service) is None:
        yield Refusal(
            "incremental_upgrades_need_their_options",
            _OPTIONS,
            "is not set",
            "Set gatewayClassName, maxSurgePercent, stepSizePercent and intervalSeconds.",
        )


def surge_and_step_are_percentages(service: Object) -> Iterator[Refusal]:
    options = _incremental_options(service)
    if options is None:
        return
    for field, default in (("maxSurgePercent", 100), ("stepSizePercent", None)):
        share = number(options.get(field, default))
        if share is None or not 0 <= share <= 100:
            yield Refusal(
                "surge_and_step_are_percentages",
                f"{_OPTIONS}.{field}",
                "is not set" if options.get(field) is None else f"is {options[field]}",
                f"Set {field} to a number from 0 to 100.",
            )


def a_step_is_at_most_the_surge(service: Object) -> Iterator[Refusal]:
    options = _incremental_options(service) or {}
    surge, step = (
        number(options.get("maxSurgePercent", 100)),
        number(options.get("stepSizePercent")),
    )
    if surge is not None and step is not None and 0 <= surge < step <= 100:
        yield Refusal(
            "a_step_is_at_most_the_surge",
            f"{_OPTIONS}.stepSizePercent",
            f"is {step}, over maxSurgePercent, {surge}",
            "Lower stepSizePercent or raise maxSurgePercent.",
        )


def the_interval_is_positive(service: Object) -> Iterator[Refusal]:
    options = _incremental_options(service)
    if options is not None and (number(options.get("intervalSeconds")) or 0) <= 0:
        yield Refusal(
            "the_interval_is_positive",
            f"{_OPTIONS}.intervalSeconds",
            f"is {options.get('intervalSeconds', 'not set')}",
            "Set intervalSeconds to 1 or more.",
        )


def the_gateway_class_is_named(service: Object) -> Iterator[Refusal]:
    options = _incremental_options(service)
    if options is not None and not options.get("gatewayClassName"):
        yield Refusal(
            "the_gateway_class_is_named",
            f"{_OPTIONS}.gatewayClassName",
            "is not set",
            "Name a GatewayClass of this cluster: `kubectl get gatewayclass`.",
        )


RULES: list[ServiceRule] = [
    the_name_is_a_dns_label,
    the_name_leaves_room,
    the_timeout_is_a_duration,
    tokens_are_not_kubernetes,
    the_head_service_has_no_name,
    the_upgrade_is_the_services,
    the_upgrade_type_is_known,
    the_deletion_delay_is_not_negative,
    incremental_upgrades_need_the_autoscaler,
    incremental_upgrades_need_their_options,
    surge_and_step_are_percentages,
    a_step_is_at_most_the_surge,
    the_interval_is_positive,
    the_gateway_class_is_named,
]
