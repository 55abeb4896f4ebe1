"""Checks of KubeRay: its operator, and its status of applied services."""

import importlib.metadata
import re
from collections.abc import Iterator, Sequence

from serve_app.doctor.kube import Cluster, Object, full_name, images
from serve_app.doctor.report import Finding, failed, ok, warning

KUBERAY = (1, 7, 0)
"""KubeRay version that the manifests are written for."""

_WANTED = ".".join(map(str, KUBERAY))
_REPOSITORY = "  helm repo add kuberay https://ray-project.github.io/kuberay-helm/"
_CHART = f"kuberay/kuberay-operator --version {_WANTED}"
_VALUES = "--values cluster/platform/kuberay-operator.yaml"
INSTALL = (
    f"{_REPOSITORY}\n"
    f"  helm install kuberay-operator {_CHART} \\\n"
    f"      --namespace kuberay-operator --create-namespace {_VALUES}"
)
"""Commands of docs/operate/kubernetes.md."""
_UPDATE_CRDS = (
    f"{_REPOSITORY}\n"
    "  helm repo update kuberay\n"
    f"  helm show crds {_CHART} \\\n"
    "      | kubectl apply --server-side --force-conflicts -f -"
)
_INSTALL_ADVICE = f"Install KubeRay, in a clone of this repository:\n{INSTALL}"


def check_crds(cluster: Cluster) -> Iterator[Finding]:
    """Check the CRDs by the kinds that the API server serves, which needs no rights."""
    check = "KubeRay CRDs"
    served = cluster.served("ray.io")
    missing = [name for name in ("rayservices", "rayclusters") if name not in served.get("v1", ())]
    if not served:
        yield failed(check, "not installed: no API group ray.io", _INSTALL_ADVICE)
    elif missing:
        yield failed(
            check,
            f"ray.io/v1 has no {' and no '.join(missing)}; served are {', '.join(served)}",
            f"Helm does not update CRDs: apply those of KubeRay {_WANTED}:\n{_UPDATE_CRDS}",
        )
    else:
        yield ok(check, "ray.io/v1 has rayservices and rayclusters")


def check_operator(cluster: Cluster) -> Iterator[Finding]:
    """Check that an operator runs, and its version."""
    check = "KubeRay operator"
    found = [
        (deployment, image)
        for deployment in cluster.list("deployments.apps")
        for image in images(deployment)
        if re.search(r"kuberay.*operator", image)
    ]
    if not found:
        yield failed(check, "not installed: no deployment found", _INSTALL_ADVICE)
    for deployment, image in found:
        where = f"{full_name(deployment)}, {image}"
        status = deployment.get("status") or {}
        version = re.search(r":v?(\d+)\.(\d+)\.(\d+)", image)
        number = tuple(map(int, version.groups())) if version else None
        if not status.get("availableReplicas"):
            yield failed(
                check,
                f"{where}: not available",
                "No RayService is handled until it runs: `kubectl -n "
                f"{deployment['metadata']['namespace']} describe pod -l "
                "app.kubernetes.io/name=kuberay-operator`.",
            )
        elif number is None:
            yield warning(
                check, f"{where}: its version is unknown", f"Make sure that it is {_WANTED}."
            )
        elif number < KUBERAY:
            yield failed(check, f"{where}: older than {_WANTED}", _advice_on_upgrade(deployment))
        elif number[:2] > KUBERAY[:2]:
            yield warning(
                check,
                f"{where}: newer than {_WANTED}",
                f"The manifests were checked with {_WANTED}: read KubeRay's notes on what changed.",
            )
        else:
            yield ok(check, where)


def _advice_on_upgrade(deployment: Object) -> str:
    """Advise on an upgrade of the same Helm release: another name would install a second one."""
    annotations = deployment["metadata"].get("annotations") or {}
    release = annotations.get("meta.helm.sh/release-name")
    namespace = annotations.get("meta.helm.sh/release-namespace")
    start = "The manifests use fields that this version lacks. "
    if release is None or namespace is None:
        return (
            f"{start}Helm did not install it: update it the way it was installed, to {_WANTED}, "
            f"after its CRDs:\n{_UPDATE_CRDS}"
        )
    return (
        f"{start}Update it after its CRDs, which Helm leaves alone; in a clone of this repository, "
        f"with all values files that it was installed with:\n{_UPDATE_CRDS}\n"
        f"  helm upgrade {release} {_CHART} \\\n"
        f"      --namespace {namespace} {_VALUES}"
    )


def check_ray_version(services: Sequence[Object]) -> Iterator[Finding]:
    """Compare each service's ``rayVersion`` with the Ray of this installation."""
    here = importlib.metadata.version("ray")
    for service in services:
        name = service["metadata"]["name"]
        theirs = (service["spec"].get("rayClusterConfig") or {}).get("rayVersion")
        found = f"{name} has {theirs}, this machine {here}"
        if theirs == here:
            yield ok("Ray version", found)
        else:
            yield warning(
                "Ray version",
                found,
                "spec.rayClusterConfig.rayVersion must be the Ray of its images, and this version "
                f"of diffusion-serve runs on {here}.",
            )


_REFUSED = "ValidationFailed"
_TIMED_OUT = "InitializingTimeout"
_TIMEOUT = "ray.io/initializing-timeout"


def _ready(service: Object) -> Object:
    conditions = (service.get("status") or {}).get("conditions") or ()
    return next((one for one in conditions if one["type"] == "Ready"), {})


def has_no_clusters(service: Object) -> bool:
    """Return whether KubeRay creates no pods for it, by its Ready condition."""
    return _ready(service).get("reason") in (_REFUSED, _TIMED_OUT)


def check_refusals(cluster: Cluster) -> Iterator[Finding]:
    """Check for rejections by KubeRay or the API server, after which no pod exists to report."""
    for service in cluster.list("rayservices.ray.io", everywhere=False):
        ready = _ready(service)
        if ready.get("reason") == _REFUSED:
            yield failed(
                f"RayService {service['metadata']['name']}",
                f"rejected by the operator: {ready.get('message', '')}",
                "Correct the named field and apply it again; until then KubeRay ignores it, and "
                "the previous version continues to run.",
            )
    for ray_cluster in cluster.list("rayclusters.ray.io", everywhere=False):
        conditions = {
            one["type"]: one for one in (ray_cluster.get("status") or {}).get("conditions") or []
        }
        failure = conditions.get("ReplicaFailure", {})
        if failure.get("status") == "True":
            yield failed(
                f"RayCluster {ray_cluster['metadata']['name']}",
                f"its pods cannot be created: {failure.get('reason', '')} "
                f"{failure.get('message', '')}".strip(),
                "The API server rejects the pod template: correct the named field (a "
                "toleration's effect, for example), a quota, or an admission rule.",
            )


def check_services(cluster: Cluster) -> Iterator[Finding]:
    """Check that the namespace's RayServices serve; the causes have rows of their own."""
    for service in cluster.list("rayservices.ray.io", everywhere=False):
        check = f"RayService {service['metadata']['name']}"
        status, ready = service.get("status") or {}, _ready(service)
        broken = [
            f"application {name} is {application['status']}: {application.get('message', '')}"
            for part in ("activeServiceStatus", "pendingServiceStatus")
            for name, application in (
                (status.get(part) or {}).get("applicationStatuses") or {}
            ).items()
            if application.get("status") in ("DEPLOY_FAILED", "UNHEALTHY")
        ]
        if ready.get("reason") == _REFUSED:
            continue  # see `check_refusals`
        if not status:
            yield warning(
                check,
                "no status",
                "The operator has not handled it yet: run the doctor again, then read the "
                "operator's log and `kubectl describe rayservice`.",
            )
        elif ready.get("reason") == _TIMED_OUT:
            yield _timed_out(check, service, ready)
        elif broken:
            yield failed(
                check,
                "; ".join(text.strip().rstrip(":") for text in broken),
                "Correct the Serve config (`diffusion-serve check`) or what the message names; "
                "`serve status` in the head pod shows all of it.",
            )
        elif ready.get("status") == "True":
            yield ok(check, "ready")
        else:
            yield failed(
                check,
                f"not ready: {ready.get('reason', '')} {ready.get('message', '')}".strip(),
                "It waits for what has failed above. If nothing has, it is still starting: the "
                "log of the head's pod and `kubectl describe rayservice` show its progress.",
            )


def _timed_out(check: str, service: Object, ready: Object) -> Finding:
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    limit = (service["metadata"].get("annotations") or {}).get(_TIMEOUT)
    return failed(
        check,
        f"{_TIMED_OUT}: {ready.get('message', '')}".rstrip(": "),
        f"It was not ready within {_TIMEOUT}{f' ({limit})' if limit else ''}, and has failed for "
        "good: KubeRay deletes its Ray clusters and ignores it from now on, whatever is applied. "
        "First remove the cause: what else has failed here, or the last events of its pods; if it "
        "only took long, raise the annotation. Then delete it and apply it again:\n"
        f"  kubectl -n {namespace} get events --sort-by=.lastTimestamp\n"
        f"  kubectl -n {namespace} delete rayservice {name}",
    )
