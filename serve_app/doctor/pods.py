"""Checks of the namespace's pods: those that do not run, grouped by cause."""

from collections.abc import Iterator

from serve_app.doctor import kuberay, pending, places
from serve_app.doctor.kube import Cluster, NotReadable, Object, Unreachable
from serve_app.doctor.report import Finding, failed, ok, warning
from serve_app.doctor.unscheduled import Surroundings


def check_pods(cluster: Cluster, to_come: bool) -> Iterator[Finding]:
    """Report the cause for each pod that does not run. ``to_come``: there may be none yet."""
    pods = cluster.list("pods", everywhere=False)
    try:
        events = cluster.list("events", everywhere=False)
    except Unreachable:
        raise
    except NotReadable as error:
        yield failed("events", error.found, error.advice)
        events = ()
    if (finding := pending.replaced(events)) is not None:
        yield finding
    if not pods:
        yield from _none(cluster, to_come)
        return
    around = _surroundings(cluster) if any(map(pending.is_unscheduled, pods)) else None
    alike: dict[tuple[str, str], list[Finding]] = {}
    for pod in pods:
        if (finding := pending.why(pod, events, around)) is not None:
            alike.setdefault((finding.found, finding.advice), []).append(finding)
    for findings in alike.values():
        first, others = findings[0], len(findings) - 1
        yield Finding(
            first.check + (f" and {others} more" if others else ""),
            first.outcome,
            first.found,
            first.advice,
        )
    if not alike:
        yield ok(
            "pods", f"none of {len(pods)} in namespace {cluster.namespace} is pending or has failed"
        )


def _none(cluster: Cluster, to_come: bool) -> Iterator[Finding]:
    services = cluster.list("rayservices.ray.io", everywhere=False)
    if services and not all(map(kuberay.has_no_clusters, services)):
        yield warning(
            "pods",
            f"none in namespace {cluster.namespace}, which has a RayService",
            "KubeRay has created none: check the rows of KubeRay and of the RayService, and the "
            "operator's log.",
        )
    elif not services and to_come:
        yield ok("pods", f"namespace {cluster.namespace} has none yet")


def _surroundings(cluster: Cluster) -> Surroundings:
    nodes: tuple[Object, ...] | None
    services: tuple[Object, ...]
    try:
        nodes = cluster.list("nodes")
    except Unreachable:
        raise
    except NotReadable:
        nodes = None
    try:
        services = cluster.list("rayservices.ray.io", everywhere=False)
    except Unreachable:
        raise
    except NotReadable:
        services = ()
    return Surroundings(nodes, places.occupancy_of(cluster), services)
