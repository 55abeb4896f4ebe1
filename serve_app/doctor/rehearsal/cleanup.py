"""Step 10 of a rehearsal: delete all that it made, and say what is left.

The RayService goes first, so that KubeRay and the Redis that it may clean up are still there when
the RayClusters end; then the namespace.
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
"""A worker's grace, 480 s, and KubeRay's removal of the head's state from Redis, up to 300 s."""

NAMESPACE_GONE_S = 300.0
"""For Kubernetes to delete what else is in the namespace."""


def leftovers(cluster: WritableCluster) -> Finding | None:
    """Namespaces of earlier rehearsals that are still there."""
    try:
        found = cluster.items(NAMESPACES, labelSelector=f"{MARK}={MARKED}")
    except NotReadable:
        return None  # creating one needs more rights, and says which
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
    """Delete the RayService, then the namespace; what is left if that does not end in time."""
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
            f"Something took the label off. If it is the rehearsal's: `kubectl delete ns {name}`.",
        )
    uid = namespace["metadata"]["uid"]
    observer, waiter = session.observer, session.waiter
    waiter.tell(f"    RayService {session.manifest.service['metadata']['name']}")
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

    # Of the RayService's deletion Kubernetes tells its RayClusters a moment later.
    ended = waiter.until(no_ray_clusters, CLUSTERS_GONE_S, session.remove_unattended, bounded=False)
    waiter.tell(f"    namespace {name}")
    _insist(session, lambda: session.cluster.delete(path, uid=uid))
    if not waiter.until(no_namespace, NAMESPACE_GONE_S, session.remove_unattended, bounded=False):
        there = session.cluster.get(path) or {}
        return _left(session, _obstacles(there))
    if not ended:
        return warning(
            check,
            f"everything is gone, but the RayClusters took longer than {CLUSTERS_GONE_S:.0f} s",
            "Look at what held them: graces of the pods, or the removal of the state in Redis.",
        )
    return ok(check, f"RayService, RayClusters and namespace {name} are gone")


def _insist(session: Session, action: Callable[[], T]) -> T:
    """Do ``action``, and again if the API server is away for a moment. Raises `NotReadable`."""
    done = session.waiter.until(lambda: (action(),), 2 * OUTAGE_S, bounded=False)
    assert done is not None, "an outage ends the waiting before its timeout does"
    return done[0]


def _obstacles(namespace: dict[str, object]) -> str:
    """What Kubernetes says that the namespace still holds."""
    status = namespace.get("status")
    conditions = status.get("conditions") if isinstance(status, dict) else None
    said = [
        str(one.get("message"))
        for one in conditions or ()
        if one.get("status") == "True" and one.get("message")
    ]
    return "; ".join(said) or "still there"


def _left(session: Session, said: str) -> Finding:
    name = session.manifest.name
    return failed(
        "delete",
        f"the deletion did not end: {said}",
        "Delete what is left; GPUs may be held until then:\n"
        f"  kubectl delete rayservices --all --namespace {name}\n"
        f"  kubectl delete namespace {name}",
    )
