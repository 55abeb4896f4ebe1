"""Step 10 of a rehearsal: delete all that it created, and report the rest.

The RayService is deleted first: KubeRay and the Redis that it may clean up must still run when the
RayClusters end. Then the namespace is deleted.
"""

from collections.abc import Callable
from typing import TypeVar

from serve_app.doctor.kube import NotReadable, base
from serve_app.doctor.kube_write import WritableCluster
from serve_app.doctor.rehearsal.manifest import MARK, MARKED
from serve_app.doctor.rehearsal.session import Session
from serve_app.doctor.rehearsal.waiting import OUTAGE_S
from serve_app.doctor.report import Finding, failed, ok, warning

T = TypeVar("T")

NAMESPACES = f"{base('v1')}/namespaces"

CLUSTERS_GONE_S = 900.0
"""Limit for a worker's grace, 480 s, and KubeRay's clean-up of Redis, up to 300 s."""

NAMESPACE_GONE_S = 300.0
"""Limit for Kubernetes to delete the rest of the namespace."""


def leftovers(cluster: WritableCluster) -> Finding | None:
    """Report namespaces of earlier rehearsals that still exist."""
    try:
        found = cluster.items(NAMESPACES, labelSelector=f"{MARK}={MARKED}")
    except NotReadable:
        return None  # creating one needs more rights, and its error names them
    names = [one["metadata"]["name"] for one in found]
    if not names:
        return None
    return warning(
        "earlier rehearsals",
        f"still there: {', '.join(names)}",
        "Unless another rehearsal runs now, delete them:\n"
        f"  kubectl delete rayservices --all --namespace {names[0]}\n"
        f"  kubectl delete namespace {' '.join(names)}",
    )


def delete(session: Session) -> Finding:
    """Delete the RayService, then the namespace; name the rest if that does not end in time."""
    try:
        return _delete(session)
    except NotReadable as error:
        return _left(session, error.found)
    except KeyboardInterrupt:
        return _left(session, "interrupted")


def _delete(session: Session) -> Finding:
    check, name = "delete", session.manifest.name
    path = f"{NAMESPACES}/{name}"
    namespace = _insist(session, lambda: session.cluster.get(path))
    if namespace is None:
        return ok(check, "nothing was created")
    if (namespace["metadata"].get("labels") or {}).get(MARK) != MARKED:
        return failed(
            check,
            f"namespace {name} lacks the label {MARK}={MARKED}, and is left alone",
            f"Something removed the label. If it is the rehearsal's: `kubectl delete ns {name}`.",
        )
    uid = namespace["metadata"]["uid"]
    observer, waiter = session.observer, session.waiter
    waiter.emit(f"    RayService {session.manifest.service['metadata']['name']}")
    _insist(session, lambda: session.cluster.delete(observer.service_path))

    def no_ray_clusters() -> bool | None:
        there = observer.ray_clusters()
        if there:
            waiter.progress(f"RayClusters that are still there: {', '.join(sorted(there))}")
        return None if there else True

    def no_namespace() -> bool | None:
        there = session.cluster.get(path)
        if there is not None:
            waiter.progress(f"namespace {name}: {_obstacles(there)}")
        return None if there else True

    # Kubernetes passes the RayService's deletion to its RayClusters a moment later.
    ended = waiter.until(no_ray_clusters, CLUSTERS_GONE_S, session.remove_unattended, bounded=False)
    waiter.emit(f"    namespace {name}")
    _insist(session, lambda: session.cluster.delete(path, uid=uid))
    if not waiter.until(no_namespace, NAMESPACE_GONE_S, session.remove_unattended, bounded=False):
        there = session.cluster.get(path) or {}
        return _left(session, _obstacles(there))
    if not ended:
        return warning(
            check,
            f"everything is gone, but the RayClusters took longer than {CLUSTERS_GONE_S:.0f} s",
            "Check what delayed them: graces of the pods, or the removal of the state in Redis.",
        )
    return ok(check, f"RayService, RayClusters and namespace {name} are gone")


def _insist(session: Session, action: Callable[[], T]) -> T:
    """Do ``action``, with retries while the API server is away. Raises `NotReadable`."""
    done = session.waiter.until(lambda: (action(),), 2 * OUTAGE_S, bounded=False)
    assert done is not None, "an outage ends the waiting before its timeout does"
    return done[0]


def _obstacles(namespace: dict[str, object]) -> str:
    """Return the conditions of the namespace about its remaining objects."""
    status = namespace.get("status")
    conditions = status.get("conditions") if isinstance(status, dict) else None
    details = [
        str(one.get("message"))
        for one in conditions or ()
        if one.get("status") == "True" and one.get("message")
    ]
    return "; ".join(details) or "still there"


def _left(session: Session, details: str) -> Finding:
    name = session.manifest.name
    return failed(
        "delete",
        f"the deletion did not end: {details}",
        "Delete what is left; GPUs may be in use until then:\n"
        f"  kubectl delete rayservices --all --namespace {name}\n"
        f"  kubectl delete namespace {name}",
    )
