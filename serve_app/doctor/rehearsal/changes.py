"""Steps 7 to 9 of a rehearsal: a Serve config in place, an upgrade, and a roll-back."""

from dataclasses import replace

from serve_app.doctor.kube import Object
from serve_app.doctor.rehearsal.observer import Placement
from serve_app.doctor.rehearsal.session import (
    MADE_S,
    SENT_S,
    UNCHANGED_S,
    UNPLACED_S,
    Session,
    Stop,
)
from serve_app.doctor.rehearsal.start import hash_of, unplaced
from serve_app.doctor.report import Finding, failed, ok, warning

DELETION_DELAY_S = 60
"""KubeRay's default of spec.rayClusterDeletionDelaySeconds."""

_WATCHED_DELAY_S = 120
"""The longest deletion delay that a rehearsal waits for."""

_SLACK_S = 30.0
"""Time after the delay in which the deletion must have begun."""


def in_place(session: Session) -> Finding:
    name = "Serve config"
    before = set(session.observer.ray_clusters())
    sent = session.observer.config_updates()
    session.cluster.apply(session.manifest.in_place)

    def no_other() -> None:
        if more := set(session.observer.ray_clusters()) - before:
            raise Stop(
                failed(
                    name,
                    f"the operator made another RayCluster for it: {', '.join(sorted(more))}",
                    "A change of spec.serveConfigV2 must not cost a second set of GPUs: check "
                    "whether something else rewrites the RayService (a webhook, a GitOps tool).",
                )
            )

    def arrived() -> bool | None:
        return session.observer.config_updates() > sent or None

    has_arrived = session.until(arrived, SENT_S if session.serves else UNCHANGED_S, no_other)
    if session.serves:
        session.wait_until_serving(name, session.first, no_other)
    if session.kubelet != "runs":
        return ok(name, f"RayCluster {session.first} stays, and no other was made")
    image = session.request_image(name)
    if image.outcome != "ok":
        return image
    details = f"RayCluster {session.first} stays; then {image.found}"
    if has_arrived:
        return ok(name, details)
    return warning(
        name,
        f"{details}; no event shows that the operator sent the new config",
        "Look at the operator's log for the Serve config.",
    )


def upgrade(session: Session) -> Finding:
    try:
        return _replace_cluster(session, "upgrade", session.manifest.upgraded, original=False)
    except Stop as stop:
        return stop.finding  # a roll-back is the remedy for a failed upgrade


def roll_back(session: Session) -> Finding:
    return _replace_cluster(session, "roll back", session.manifest.service, original=True)


def _replace_cluster(session: Session, name: str, applied: Object, original: bool) -> Finding:
    """Apply a pod template and follow the new RayCluster."""
    strategy = (applied["spec"].get("upgradeStrategy") or {}).get("type")
    if strategy == "None":
        return ok(name, "left out: upgradeStrategy None, so that KubeRay replaces nothing")
    before = {
        one
        for one, there in session.observer.ray_clusters().items()
        if not there["metadata"].get("deletionTimestamp")
    }
    current = session.observer.service().newest
    session.reset_counts()
    session.cluster.apply(applied)

    def probe() -> str | None:
        service = session.observer.service()
        session.waiter.progress(str(service))
        one = session.observer.ray_clusters().get(service.newest)
        if one is None or (hash_of(one) == session.first_hash) is not original:
            return None
        return service.newest

    target = session.until(probe, MADE_S, session.sample)
    if target is None:
        return _not_replaced(session, name)
    if target == current:
        return ok(name, f"left out: RayCluster {current} was not replaced")
    session.waiter.emit(f"    RayCluster {target} beside {', '.join(sorted(before))}")
    delay_s = int(applied["spec"].get("rayClusterDeletionDelaySeconds", DELETION_DELAY_S))
    # The replaced cluster may use its GPUs until then.
    patience_s = UNPLACED_S + (min(delay_s, _WATCHED_DELAY_S) if original else 0)
    placement = session.placed(name, target, patience_s)
    if not placement.complete:
        return _short(session, name, target, placement, original)
    found = f"RayCluster {target}"
    if original:
        found += " has the first pod template again"
        found += ", as a third one" if len(before) > 1 else ""
    found += f"; {placement}"
    if session.serves:
        session.wait_until_serving(name, target, session.sample)
        found += "; it has taken over"
    found += _old_ones(session, before - {target}, delay_s)
    if session.kubelet == "runs":
        requested = len(session.answers) + len(session.failures)
        if session.failures:
            return failed(
                name,
                f"{found}; {len(session.failures)} of {requested} requests failed, first "
                f"{session.failures[0]}",
                "No request may fail during an upgrade. Compare the graces and the drain of "
                "the worker pods with the longest request, and check the workers' logs.",
            )
        found += f"; {requested} requests meanwhile, none failed"
    return ok(name, found)


def _not_replaced(session: Session, name: str) -> Finding:
    if session.kubelet == "fake" and not session.serves:
        return ok(
            name,
            "left out: before it compares specs, the operator queries the dashboard of the head, "
            "and nothing answers there",
        )
    details = session.observer.complaints()
    return failed(
        name,
        f"no RayCluster of this pod template within {MADE_S:.0f} s; "
        f"{session.observer.service()}" + (f"; events: {details}" if details else ""),
        "Look at the operator's log for this RayService.",
    )


def _short(
    session: Session, name: str, target: str, placement: Placement, original: bool
) -> Finding:
    service = session.observer.service()
    if original and service.ready and service.active == session.first:
        return warning(
            name,
            f"RayCluster {session.first} continues to serve, and has the first pod template; "
            f"KubeRay still makes {target} with the same template, and it has no room: {placement}",
            "Free the GPUs of one more RayCluster, or delete the RayService and apply it anew.",
        )
    finding = unplaced(name, placement)
    return replace(
        finding,
        found=f"RayCluster {target} has no room: {finding.found}",
        advice=f"{finding.advice}\nAn upgrade runs two RayClusters at a time. Have spare GPUs "
        "for minReplicas of each group. Or set spec.upgradeStrategy.type to None, and delete "
        "and apply the RayService for each change.",
    )


def _old_ones(session: Session, old: set[str], delay_s: int) -> str:
    """Wait until KubeRay deletes the replaced RayCluster, unless its delay is long."""
    names = ", ".join(sorted(old))
    if delay_s > _WATCHED_DELAY_S:
        return f"; {names} stays for {delay_s} s (rayClusterDeletionDelaySeconds)"
    started_s = session.waiter.elapsed_s()

    def probe() -> bool | None:
        there = session.observer.ray_clusters()
        stays = [
            name
            for name in old & set(there)
            if not there[name]["metadata"].get("deletionTimestamp")
        ]
        return None if stays else True

    if session.until(probe, delay_s + _SLACK_S, session.sample) is None:
        return f"; {names} still there {delay_s + _SLACK_S:.0f} s later (delay: {delay_s} s)"
    took_s = session.waiter.elapsed_s() - started_s
    return f"; the deletion of {names} began {took_s:.0f} s later (delay: {delay_s} s)"
