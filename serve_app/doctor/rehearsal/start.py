"""Steps 1 to 6 of a rehearsal: from the checks before it to the first image."""

from collections.abc import Iterator

from serve_app.doctor import kuberay
from serve_app.doctor.kube import NotReadable, Object, base
from serve_app.doctor.rehearsal.cleanup import NAMESPACES, leftovers
from serve_app.doctor.rehearsal.observer import HASH, Kubelet, Placement
from serve_app.doctor.rehearsal.session import (
    FAKE_READY_S,
    KUBELET_S,
    MADE_S,
    UNPLACED_S,
    Session,
    Stop,
    serving,
)
from serve_app.doctor.report import Finding, any_failed, failed, ok, warning


def preflight(session: Session) -> Finding:
    found = list(kuberay.check_crds(session.cluster))
    try:
        found += kuberay.check_operator(session.cluster)
    except NotReadable as error:
        found.append(warning("KubeRay operator", error.found, error.advice))
    for finding in found:
        session.extra.append(finding)
    if (left := leftovers(session.cluster)) is not None:
        session.extra.append(left)
    name = "preflight"
    if any_failed(found):
        raise Stop(failed(name, "nothing was created", "Correct the failed checks above first."))
    return ok(name, f"{session.cluster.name}, Kubernetes {session.cluster.version()}")


def apply(session: Session) -> Finding:
    manifest, name = session.manifest, "apply"
    session.cluster.create(NAMESPACES, manifest.namespace)
    rejected: list[NotReadable] = []
    for one in (*manifest.objects, *manifest.only_checked):
        only_checked = one in manifest.only_checked
        what = f"{one['kind']} {one['metadata']['name']}"
        try:
            session.cluster.apply(one, dry_run=only_checked)
        except NotReadable as error:
            session.waiter.emit(f"    {what}: {error.found}")
            rejected.append(error)
            if one is manifest.service:
                raise Stop(failed(name, error.found, error.advice)) from None
        else:
            how = "accepted in a dry run, not created" if only_checked else "created"
            session.waiter.emit(f"    {what}: {how}")
    for finding in _warnings_of_manifest(session):
        session.extra.append(finding)
    if rejected:
        return failed(
            name,
            f"{len(rejected)} objects rejected: "
            + "; ".join(dict.fromkeys(one.found for one in rejected)),
            "\n".join(dict.fromkeys(one.advice for one in rejected)),
        )
    made = ", ".join(manifest.made_secrets)
    checked = len(manifest.only_checked)
    return ok(
        name,
        f"{len(manifest.objects)} objects created"
        + (f", among them Secrets with random values ({made})" if made else "")
        + (f"; {checked} that act beyond the namespace only checked" if checked else ""),
    )


def _warnings_of_manifest(session: Session) -> Iterator[Finding]:
    if session.manifest.pull_secrets:
        yield warning(
            "imagePullSecrets",
            "not created, because their content is unknown: "
            f"{', '.join(session.manifest.pull_secrets)}",
            "Nodes that know the registry need none. Else append the Secrets to the manifest, "
            "with the overlay's namespace; the rehearsal applies them.",
        )
    claims = [one for one in session.manifest.objects if one["kind"] == "PersistentVolumeClaim"]
    if not claims:
        return
    try:
        found = session.cluster.items(f"{base('storage.k8s.io/v1')}/storageclasses")
    except NotReadable as error:
        yield warning("storage", error.found, error.advice)
        return
    names = [one["metadata"]["name"] for one in found]
    for one in claims:
        wanted = one["spec"].get("storageClassName")
        if wanted and wanted not in names:
            yield warning(
                f"claim {one['metadata']['name']}",
                f"stays pending: its StorageClass {wanted} does not exist",
                f"Set storageClassName to one of {', '.join(names) or '(there are none)'}.",
            )


def ray_cluster(session: Session) -> Finding:
    name = "RayCluster"

    def probe() -> str | None:
        service = session.observer.service()
        session.waiter.progress(str(service))
        if service.refusal:
            raise Stop(
                failed(
                    name,
                    f"the operator rejects the RayService: {service.refusal}",
                    "Correct what it names: the API server accepts more than the operator.",
                )
            )
        made = session.observer.ray_clusters()
        return service.newest if service.newest in made else None

    made = session.waiter.until(probe, MADE_S)
    if made is None:
        details = session.observer.complaints() or "no event about this RayService"
        raise Stop(
            failed(
                name,
                f"the operator made none within {MADE_S:.0f} s ({session.observer.service()}); "
                f"events: {details}",
                "Look at the operator's log. It may watch other namespaces only "
                "(watchNamespace of its chart), or miss a CRD that the upgrade strategy needs "
                "(Gateway API).",
            )
        )
    session.first = made
    session.first_hash = hash_of(session.observer.ray_clusters().get(made) or {})
    return ok(name, made)


def pods(session: Session) -> Finding:
    name = "pods"
    placement = session.placed(name, session.first, UNPLACED_S)
    if not placement.complete:
        raise Stop(unplaced(name, placement))
    pods = placement.bound

    def probe() -> Kubelet | None:
        names = {pod["metadata"]["name"] for pod in pods}
        return session.observer.kubelet(
            [pod for pod in session.observer.pods() if pod["metadata"]["name"] in names]
        )

    session.kubelet = session.waiter.until(probe, KUBELET_S) or "none"
    if session.kubelet != "runs":
        how = "its nodes are fake" if session.kubelet == "fake" else "no kubelet takes them up"
        session.extra.append(
            warning(
                "kubelet",
                f"none runs these pods ({how}): reconciliation and scheduling are checked, "
                "images are not",
                "Rehearse the rest where pods run: kind, or the cluster itself.",
            )
        )
    return ok(name, str(placement))


def ready(session: Session) -> Finding:
    name = "ready"
    if session.kubelet == "none":
        return ok(name, "left out: no kubelet")
    if session.kubelet == "fake":
        service = session.until(lambda: serving(session.observer.service(), ""), FAKE_READY_S)
        session.serves = service is not None
        details = "the operator reports it as ready" if service else f"{session.observer.service()}"
        return ok(name, f"left out: the nodes are fake; {details}")
    session.wait_until_serving(name, session.first)
    session.serves = True
    return ok(name, f"{session.observer.service()}")


def image(session: Session) -> Finding:
    if session.kubelet != "runs":
        return ok("image", "left out: no container runs")
    return session.request_image("image")


def unplaced(name: str, placement: Placement) -> Finding:
    """Return the failure of pods that were not created or bound, with the scheduler's message."""
    advice = [one.advice for one in placement.unplaced]
    if placement.missing:
        advice.append("Look at the operator's log: it makes the pods of a RayCluster.")
    return failed(name, str(placement), "\n".join(dict.fromkeys(advice)))


def hash_of(ray_cluster: Object) -> str:
    """Return the spec of a RayCluster as KubeRay compares it."""
    return str(((ray_cluster.get("metadata") or {}).get("annotations") or {}).get(HASH, ""))
