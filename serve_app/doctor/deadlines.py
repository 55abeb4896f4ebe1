"""The chain of deadlines of a RayService: the order in which requests, replicas and pods end.

A request < the grace of its replica <= the drain of its node < the grace of its pod <
the delay after which the old Ray cluster of an upgrade is deleted. Where a link is out of order,
requests are cut off. Pure: reads a RayService as the API returns it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from serve_app.config.deployment_names import GATEWAY
from serve_app.config.models import parse_app_config
from serve_app.deadlines import graceful_shutdown_timeouts_s, longest_requests_s
from serve_app.doctor.kube import Object
from serve_app.doctor.operator_rules.rule import Node, RayCluster, mapping
from serve_app.doctor.selectors import placed
from serve_app.doctor.serve_config import FIELD, applications, deployments
from serve_app.errors import ConfigError

DRAIN_VARIABLE = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
_DELAY = "spec.rayClusterDeletionDelaySeconds"
_DRAIN_S, _POD_GRACE_S, _DELAY_S = 30.0, 30.0, 60.0
"""Defaults of Ray, Kubernetes and KubeRay."""


@dataclass(frozen=True)
class Link:
    """One duration of a chain."""

    name: str
    field: str
    """Path in the RayService."""
    seconds: float
    advice: str = ""
    may_equal: bool = False
    """True if it may be as long as the link before it."""


@dataclass(frozen=True)
class Misorder:
    """A link that is no longer than the one before it."""

    link: Link
    before: Link

    @property
    def found(self) -> str:
        word = "less than" if self.link.may_equal else "not over"
        return f"is {self.link.seconds:g}, {word} {self.before.name}, {self.before.seconds:g}"


Chain = tuple[Link, ...]


def chains(service: Object) -> list[Chain]:
    """Build each deployment's chain in each worker group of its replicas, then the head's.

    Raises:
        ConfigError: if this project's Serve config is missing, or it or a duration is wrong.
    """
    cluster = RayCluster.of_service(service)
    delay_s = mapping(service.get("spec")).get("rayClusterDeletionDelaySeconds")
    delay = Link(
        "the deletion delay",
        _DELAY,
        _DELAY_S if delay_s is None else _seconds(_DELAY, delay_s),
        "Set rayClusterDeletionDelaySeconds above the grace of the workers' pods: after an "
        "upgrade's switch the old Ray cluster still has requests.",
    )
    found = []
    places = [set(one.groups) for one in placed(service)]
    links = [one for application in applications(service) for one in _replicas(application)]
    for (request, grace), names in zip(links, places, strict=True):
        found += [
            (request, grace, *_pod(group), delay) for group in cluster.groups if group.path in names
        ]
    return [*found, _pod(cluster.head)]


def misorders(service: Object) -> Iterator[Misorder]:
    """Yield each link that is out of order, once. Raises `ConfigError` as `chains` does."""
    seen = set()
    for chain in chains(service):
        for before, link in pairwise(chain):
            in_order = before.seconds < link.seconds or (
                link.may_equal and before.seconds == link.seconds
            )
            # All chains of a group share their last links.
            if not in_order and (link.field, before.field) not in seen:
                seen.add((link.field, before.field))
                yield Misorder(link, before)


def as_text(chain: Chain) -> str:
    """Format a chain: ``the longest request 420 < ... < the deletion delay 600``."""
    first, *others = chain
    signs = ("<=" if link.may_equal else "<" for link in others)
    return " ".join(
        [f"{first.name} {first.seconds:g}"]
        + [f"{sign} {link.name} {link.seconds:g}" for sign, link in zip(signs, others, strict=True)]
    )


def _replicas(application: Mapping[str, Any]) -> Iterator[tuple[Link, Link]]:
    """Yield each deployment's longest request and grace of its replicas, ordered as `placed`."""
    config = parse_app_config(application.get("args") or {})
    longest_s, graces_s = longest_requests_s(config), graceful_shutdown_timeouts_s(config)
    overrides = deployments(application)
    for name, seconds in longest_s.items():
        limits = "max_hold_s and max_deadline_s" if name == GATEWAY else "max_deadline_s"
        field = f"{FIELD}: graceful_shutdown_timeout_s of {name}"
        given = mapping(overrides.get(name)).get("graceful_shutdown_timeout_s", graces_s[name])
        yield (
            Link(f"the longest request ({limits})", f"{FIELD}: {limits}", seconds),
            Link(
                f"graceful_shutdown_timeout_s of {name}",
                field,
                _seconds(field, given),
                "Leave graceful_shutdown_timeout_s out of the Serve config: it follows from the "
                "limits.",
            ),
        )


def _pod(node: Node) -> tuple[Link, Link]:
    """Return the drain of the Ray node, and the grace of its pod."""
    group = node.path.rpartition(".")[2]
    drain = f"{node.variables_path}.{DRAIN_VARIABLE}"
    grace = f"{node.pod_path}.terminationGracePeriodSeconds"
    return (
        Link(
            f"{DRAIN_VARIABLE} of {group}",
            drain,
            _seconds(drain, node.variables.get(DRAIN_VARIABLE, _DRAIN_S)),
            f"Raise {DRAIN_VARIABLE} in the pod template, or lower max_deadline_s or max_hold_s in "
            "the Serve config.",
            may_equal=True,
        ),
        Link(
            f"terminationGracePeriodSeconds of {group}",
            grace,
            _seconds(grace, node.pod.get("terminationGracePeriodSeconds", _POD_GRACE_S)),
            "Raise terminationGracePeriodSeconds of the pod template.",
        ),
    )


def _seconds(field: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{field} is {value!r}, which is not a number of seconds.") from None
