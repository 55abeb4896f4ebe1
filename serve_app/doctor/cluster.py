"""The checks of a Kubernetes cluster: before pods are paid for, and of those that are there."""

from collections.abc import Callable, Iterator, Sequence

import yaml

from serve_app.doctor import gpu_nodes, kuberay, pending, placement
from serve_app.doctor.kube import Cluster, NotReadable, Object, Unreachable
from serve_app.doctor.report import Finding, failed, ok, warning
from serve_app.errors import ConfigError

_DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"


def read_overlay(text: str, name: str) -> list[Object]:
    """The objects of a rendered manifest. Raises `ConfigError` without a whole RayService."""
    try:
        objects = [one for one in yaml.safe_load_all(text) if one]
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not YAML: {error}") from None
    objects = [one for one in objects if isinstance(one, dict) and one.get("kind")]
    services = [one for one in objects if one["kind"] == "RayService"]
    for service in services:
        if not (
            isinstance(service.get("spec"), dict) and "name" in (service.get("metadata") or {})
        ):
            raise ConfigError(f"{name} has a RayService without metadata.name or without spec.")
    if not services:
        raise ConfigError(
            f"{name} has no RayService; render the overlay first: `kubectl kustomize "
            "cluster/overlays/production`."
        )
    return objects


def look(cluster: Cluster, cpu: bool, overlay: Sequence[Object] | None = None) -> Iterator[Finding]:
    """Every check. ``cpu``: no GPU is expected; ``overlay``: what is to be applied.

    Without an overlay, what the namespace holds is looked at instead.
    """
    try:
        version = cluster.version()
    except Unreachable as error:
        yield failed("cluster", error.found, error.advice)
        return
    yield ok("cluster", f"{cluster.name}, Kubernetes {version}, namespace {cluster.namespace}")

    def services() -> list[Object]:
        if overlay is not None:
            return [one for one in overlay if one["kind"] == "RayService"]
        return list(cluster.list("rayservices.ray.io", everywhere=False))

    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("KubeRay CRDs", lambda: kuberay.check_crds(cluster)),
        ("KubeRay operator", lambda: kuberay.check_operator(cluster)),
    ]
    if not cpu:
        checks += [
            ("device plugin", lambda: gpu_nodes.check_device_plugin(cluster)),
            ("GPU nodes", lambda: gpu_nodes.check_gpu_nodes(cluster)),
        ]
    checks += [
        ("pods' places", lambda: gpu_nodes.check_places(cluster, services())),
        ("storage", lambda: _check_storage(cluster, services(), overlay)),
        ("Ray version", lambda: kuberay.check_ray_version(services())),
        ("services", lambda: kuberay.check_services(cluster)),
        ("pods", lambda: _check_pods(cluster)),
    ]
    for name, check in checks:
        try:
            yield from check()
        except Unreachable as error:  # it went away
            yield failed(name, error.found, error.advice)
            return
        except NotReadable as error:
            yield failed(name, error.found, error.advice)


def _check_storage(
    cluster: Cluster, services: list[Object], overlay: Sequence[Object] | None
) -> Iterator[Finding]:
    """Each claim that a pod template names, and the StorageClass that it needs."""
    names = {
        volume["persistentVolumeClaim"]["claimName"]
        for service in services
        for group in placement.groups(service)
        for volume in group.pod.get("volumes") or []
        if volume.get("persistentVolumeClaim")
    }
    if not names:
        yield ok("storage", "no pod template names a PersistentVolumeClaim")
        return
    here = {one["metadata"]["name"]: one for one in _claims(cluster)}
    coming = {
        one["metadata"]["name"]: one
        for one in overlay or ()
        if one["kind"] == "PersistentVolumeClaim"
    }
    for name in sorted(names):
        check = f"claim {name}"
        if (claim := here.get(name) or coming.get(name)) is None:
            yield failed(
                check,
                f"a pod template names it, and namespace {cluster.namespace} does not have it",
                "Apply the claim: it comes with the component `model-cache`.",
            )
        elif (claim.get("status") or {}).get("phase") == "Bound":
            yield ok(check, f"bound to {claim['spec'].get('volumeName', 'a volume')}")
        else:
            yield _check_class(check, claim, cluster.list("storageclasses.storage.k8s.io"))


def _claims(cluster: Cluster) -> tuple[Object, ...]:
    return cluster.list("persistentvolumeclaims", everywhere=False)


def _check_class(check: str, claim: Object, classes: Sequence[Object]) -> Finding:
    wanted = claim["spec"].get("storageClassName")
    names = [one["metadata"]["name"] for one in classes]
    if wanted is None:
        default = [
            one["metadata"]["name"]
            for one in classes
            if (one["metadata"].get("annotations") or {}).get(_DEFAULT_CLASS) == "true"
        ]
        if default:
            return ok(check, f"the default StorageClass {default[0]} makes its volume")
        return failed(
            check,
            "it names no StorageClass, and none is the default",
            f"Set storageClassName of the claim to one of {', '.join(names) or '(none is here)'}, "
            "or make one the default:\n"
            f"  kubectl annotate storageclass NAME {_DEFAULT_CLASS}=true",
        )
    if wanted == "":
        return warning(
            check,
            "not bound, and no StorageClass is to make its volume",
            'storageClassName: "" waits for a PersistentVolume that somebody makes by hand.',
        )
    if wanted not in names:
        return failed(
            check,
            f"its StorageClass {wanted} does not exist",
            f"Set storageClassName to one of {', '.join(names) or '(none is here)'}, or create it.",
        )
    return ok(check, f"the StorageClass {wanted} makes its volume")


def _check_pods(cluster: Cluster) -> Iterator[Finding]:
    """Those that do not run; alike ones together."""
    pods = cluster.list("pods", everywhere=False)
    alike: dict[tuple[str, str], list[Finding]] = {}
    for pod in pods:
        if (finding := pending.why(pod)) is not None:
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
        yield ok("pods", f"none of {len(pods)} is pending")
