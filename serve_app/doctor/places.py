"""Checks that the pods of a RayService will find nodes, before the scheduler tries."""

from collections.abc import Iterator, Sequence

from serve_app.doctor import fit, placement, shortage
from serve_app.doctor.kube import Cluster, NotReadable, Object, Unreachable
from serve_app.doctor.placement import Group
from serve_app.doctor.report import Finding, failed, ok, warning

STARTS_EMPTY = (
    "The group starts without pods: do nothing if the cluster's autoscaler adds nodes "
    "for it. Otherwise:"
)


def check_places(
    cluster: Cluster, services: Sequence[Object], to_come: bool = False
) -> Iterator[Finding]:
    """Compare each group of pods with each node.

    ``to_come``: the pods do not exist yet, so that the resources of other pods count as well. An
    applied service without room has pending pods, which have rows of their own.
    """
    nodes = cluster.list("nodes")
    occupancy = occupancy_of(cluster) if to_come else None
    running = {
        one["metadata"]["name"]: one
        for one in (cluster.list("rayservices.ray.io", everywhere=False) if to_come else ())
        if (one.get("status") or {}).get("activeServiceStatus", {}).get("rayClusterName")
    }
    for service in services:
        for group in placement.groups(service):
            finding = _check_place(group, nodes, occupancy, cluster.namespace, to_come)
            if finding.outcome == "warning" and service["metadata"]["name"] in running:
                upgrade = shortage.advice_on_upgrade(service, list(placement.requests(group.pod)))
                finding = warning(
                    finding.check,
                    finding.found,
                    "It runs already: applying this needs more room only where it changes the "
                    "Ray cluster, not where it changes serveConfigV2.\n"
                    f"{upgrade}\n{finding.advice}",
                )
            yield finding


def occupancy_of(cluster: Cluster) -> fit.Occupancy | None:
    """Return the resources that pods of all namespaces use; None where they may not be read."""
    try:
        return fit.Occupancy(cluster.list("pods"))
    except Unreachable:
        raise
    except NotReadable:
        return None


def _check_place(
    group: Group,
    nodes: Sequence[Object],
    occupancy: fit.Occupancy | None,
    namespace: str,
    to_come: bool,
) -> Finding:
    fits = fit.judge(group.pod, nodes, occupancy)
    taking = sum(one.takes for one in fits)
    if taking:
        found = f"{taking} of {len(nodes)} nodes can take its pods"
        if occupancy is not None:
            found += " now"
        elif to_come:
            found += (
                " when empty; the free room is unknown, since pods of all namespaces may not be "
                "read"
            )
        return ok(group.name, found)
    found, advice = shortage.explain(group.pod, nodes, fits, occupancy, namespace)
    [first, *_] = fit.nearest(fits) or [fit.Fit("none")]
    if first.takes_when_free and nodes:
        return warning(group.name, f"full at the moment: {found}", "\n".join(advice))
    if group.may_be_empty and (first.labels or first.absent or first.small):
        return warning(group.name, found, "\n".join([STARTS_EMPTY, *advice]))
    return failed(group.name, found, "\n".join(advice))
