"""The checks of a Kubernetes cluster, before pods cost money and while they run."""

from collections.abc import Callable, Iterator, Sequence

import yaml

from serve_app.config.serve_file import IMPORT_PATH
from serve_app.doctor import (
    gateways,
    gpu_nodes,
    kinds,
    kuberay,
    manifest,
    placement,
    places,
    pods,
    secrets,
)
from serve_app.doctor.kube import Cluster, NotReadable, Object, Unreachable
from serve_app.doctor.report import Finding, failed, ok, warning
from serve_app.errors import ConfigError

_DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
_COMMAND = "diffusion-serve doctor --cluster"
_BEFORE = (
    "Before you apply anything, compare it with the cluster:\n"
    f"  kubectl kustomize cluster/overlays/production | {_COMMAND} --overlay -"
)


def read_overlay(text: str, name: str) -> list[Object]:
    """Parse a rendered manifest. Raises `ConfigError` without a complete RayService."""
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


def choose_namespace(overlay: Sequence[Object], name: str, requested: str | None) -> str | None:
    """Return the namespace of ``overlay``, read from ``name``; None if nothing names it.

    Raises:
        ConfigError: if it has several, or another than ``requested``.
    """
    found = {one["metadata"].get("namespace") for one in overlay if one["kind"] == "RayService"}
    if len(found) > 1:
        raise ConfigError(
            f"{name} has RayServices of several namespaces ({', '.join(sorted(map(str, found)))}); "
            "give one overlay at a time."
        )
    [own] = found
    if own is not None and requested not in (None, own):
        raise ConfigError(
            f"--namespace is {requested}, and {name} is for namespace {own}: leave --namespace out."
        )
    return own or requested


def look(cluster: Cluster, cpu: bool, overlay: Sequence[Object] | None = None) -> Iterator[Finding]:
    """Run every check. ``cpu``: no GPU is expected; ``overlay``: the objects to apply.

    Without an overlay, the objects of the namespace are checked. If it has no service of this
    project and no namespace was requested, ``cluster`` switches to the one that has it.
    """
    try:
        version = cluster.version()
    except Unreachable as error:
        yield failed("cluster", error.found, error.advice)
        return
    missing = None
    services: Sequence[Object] = ()
    try:
        if overlay is None:
            missing = _find_service(cluster)
            services = cluster.list("rayservices.ray.io", everywhere=False)
        else:
            services = [one for one in overlay if one["kind"] == "RayService"]
    except NotReadable as error:
        missing = failed("RayService", error.found, error.advice)
    yield ok("cluster", f"{cluster.name}, Kubernetes {version}, namespace {cluster.namespace}")
    if missing is not None:
        yield missing

    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("KubeRay CRDs", lambda: kuberay.check_crds(cluster)),
        ("KubeRay operator", lambda: kuberay.check_operator(cluster)),
        ("kinds", lambda: kinds.check_kinds(cluster, services, overlay)),
        ("GatewayClass", lambda: gateways.check_classes(cluster, services, overlay)),
        ("manifest", lambda: manifest.look(overlay or ())),
    ]
    if not cpu:
        checks += [
            ("device plugin", lambda: gpu_nodes.check_device_plugin(cluster)),
            ("GPU nodes", lambda: gpu_nodes.check_gpu_nodes(cluster, services)),
        ]
    checks += [
        ("pods' places", lambda: places.check_places(cluster, services, overlay is not None)),
        ("Secrets", lambda: secrets.check_secrets(cluster, services, overlay)),
        ("storage", lambda: _check_storage(cluster, services, overlay)),
        ("Ray version", lambda: kuberay.check_ray_version(services)),
        ("rejections", lambda: kuberay.check_refusals(cluster)),
        ("pods", lambda: pods.check_pods(cluster, overlay is not None)),
        ("Gateways", lambda: gateways.check_gateways(cluster)),
        # Last: the rows above give the causes that keep a service from being ready.
        ("services", lambda: kuberay.check_services(cluster)),
    ]
    for name, check in checks:
        try:
            yield from check()
        except Unreachable as error:  # it went away
            yield failed(name, error.found, error.advice)
            return
        except NotReadable as error:
            yield failed(name, error.found, error.advice)


def _find_service(cluster: Cluster) -> Finding | None:
    """Switch to the namespace of this project's service; return a finding where there is none.

    Raises `NotReadable`.
    """

    def ours(everywhere: bool) -> list[Object]:
        # Found by their Serve config: their names are free.
        return [
            one
            for one in cluster.list("rayservices.ray.io", everywhere)
            if IMPORT_PATH in (one["spec"].get("serveConfigV2") or "")
        ]

    check, here = "RayService", f"no RayService of diffusion-serve in namespace {cluster.namespace}"
    if ours(everywhere=False):
        return None
    try:
        others = sorted({one["metadata"]["namespace"] for one in ours(everywhere=True)})
    except Unreachable:
        raise
    except NotReadable:
        return warning(
            check,
            f"{here}; other namespaces may not be read",
            "If another namespace has it, name that one:\n"
            f"  {_COMMAND} --namespace NAMESPACE\n{_BEFORE}",
        )
    if not others:
        return warning(check, f"{here}, or in any other", _BEFORE)
    if len(others) == 1 and not cluster.namespace_is_requested:
        cluster.namespace = others[0]
        return None
    return failed(
        check,
        f"{here}; found in {', '.join(others)}",
        "Name the namespace:\n"
        + "\n".join(f"  {_COMMAND} --namespace {namespace}" for namespace in others),
    )


def _check_storage(
    cluster: Cluster, services: Sequence[Object], overlay: Sequence[Object] | None
) -> Iterator[Finding]:
    """Check each claim that a pod template names, and its StorageClass."""
    names = {
        volume["persistentVolumeClaim"]["claimName"]
        for service in services
        for group in placement.groups(service)
        for volume in group.pod.get("volumes") or []
        if volume.get("persistentVolumeClaim")
    }
    if not services:
        return
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
            "no storageClassName, and the cluster has no default StorageClass",
            "Set storageClassName of the claim to one of "
            f"{', '.join(names) or '(there are none)'}, "
            "or make one the default:\n"
            f"  kubectl annotate storageclass NAME {_DEFAULT_CLASS}=true",
        )
    if wanted == "":
        return warning(
            check,
            "not bound, and its storageClassName is empty",
            'storageClassName: "" needs a PersistentVolume that you create by hand.',
        )
    if wanted not in names:
        return failed(
            check,
            f"its StorageClass {wanted} does not exist",
            f"Set storageClassName to one of {', '.join(names) or '(there are none)'}, or create "
            "it.",
        )
    return ok(check, f"the StorageClass {wanted} makes its volume")
