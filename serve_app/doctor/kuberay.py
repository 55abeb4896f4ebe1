"""KubeRay: whether it is there, and what it says of what was applied."""

import importlib.metadata
import re
from collections.abc import Iterator, Sequence

from serve_app.doctor.kube import Cluster, Object, full_name, images
from serve_app.doctor.report import Finding, failed, ok, warning

KUBERAY = (1, 7, 0)
"""The version that the manifests are written for."""

_WANTED = ".".join(map(str, KUBERAY))
_REPOSITORY = "  helm repo add kuberay https://ray-project.github.io/kuberay-helm/"
_CHART = f"kuberay/kuberay-operator --version {_WANTED}"
_VALUES = "--values cluster/platform/kuberay-operator.yaml"
INSTALL = (
    f"{_REPOSITORY}\n"
    f"  helm install kuberay-operator {_CHART} \\\n"
    f"      --namespace kuberay-operator --create-namespace {_VALUES}"
)
"""As cluster/platform/README.md has it."""
_UPDATE_CRDS = (
    f"{_REPOSITORY}\n"
    "  helm repo update kuberay\n"
    f"  helm show crds {_CHART} \\\n"
    "      | kubectl apply --server-side --force-conflicts -f -"
)
_INSTALL_ADVICE = f"Install KubeRay, in a clone of this repository:\n{INSTALL}"


def check_crds(cluster: Cluster) -> Iterator[Finding]:
    """By what the API server serves, which everybody may ask."""
    check = "KubeRay CRDs"
    served = cluster.served("ray.io")
    missing = [name for name in ("rayservices", "rayclusters") if name not in served.get("v1", ())]
    if not served:
        yield failed(check, "not there: no API group ray.io", _INSTALL_ADVICE)
    elif missing:
        yield failed(
            check,
            f"ray.io/v1 has no {' and no '.join(missing)}; served are {', '.join(served)}",
            f"Helm does not update CRDs: apply those of KubeRay {_WANTED}:\n{_UPDATE_CRDS}",
        )
    else:
        yield ok(check, "ray.io/v1 has rayservices and rayclusters")


def check_operator(cluster: Cluster) -> Iterator[Finding]:
    check = "KubeRay operator"
    found = [
        (deployment, image)
        for deployment in cluster.list("deployments.apps")
        for image in images(deployment)
        if re.search(r"kuberay.*operator", image)
    ]
    if not found:
        yield failed(check, "no deployment of it", _INSTALL_ADVICE)
    for deployment, image in found:
        where = f"{full_name(deployment)}, {image}"
        status = deployment.get("status") or {}
        version = re.search(r":v?(\d+)\.(\d+)\.(\d+)", image)
        number = tuple(map(int, version.groups())) if version else None
        if not status.get("availableReplicas"):
            yield failed(
                check,
                f"{where}: not available",
                "Nothing is done about RayServices until it runs: `kubectl -n "
                f"{deployment['metadata']['namespace']} describe pod -l "
                "app.kubernetes.io/name=kuberay-operator`.",
            )
        elif number is None:
            yield warning(
                check, f"{where}: its version is not to be seen", f"Make sure that it is {_WANTED}."
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
    """For the release that it is of, since under another name Helm would install a second one."""
    annotations = deployment["metadata"].get("annotations") or {}
    release = annotations.get("meta.helm.sh/release-name")
    namespace = annotations.get("meta.helm.sh/release-namespace")
    start = "The manifests use fields that it does not know. "
    if release is None or namespace is None:
        return (
            f"{start}It did not come with Helm: update it by what brought it, to {_WANTED}, after "
            f"its CRDs:\n{_UPDATE_CRDS}"
        )
    return (
        f"{start}Update it after its CRDs, which Helm leaves alone; in a clone of this repository, "
        f"with all values files that it was installed with:\n{_UPDATE_CRDS}\n"
        f"  helm upgrade {release} {_CHART} \\\n"
        f"      --namespace {namespace} {_VALUES}"
    )


def check_ray_version(services: Sequence[Object]) -> Iterator[Finding]:
    here = importlib.metadata.version("ray")
    for service in services:
        name = service["metadata"]["name"]
        theirs = (service["spec"].get("rayClusterConfig") or {}).get("rayVersion")
        found = f"{name} says {theirs}, here is {here}"
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
    """Tell whether KubeRay makes no pods for it, and says so by its Ready condition."""
    return _ready(service).get("reason") in (_REFUSED, _TIMED_OUT)


def check_refusals(cluster: Cluster) -> Iterator[Finding]:
    """What KubeRay or the API server refuses: no pod is made, so that no other row shows it."""
    for service in cluster.list("rayservices.ray.io", everywhere=False):
        ready = _ready(service)
        if ready.get("reason") == _REFUSED:
            yield failed(
                f"RayService {service['metadata']['name']}",
                f"refused by the operator: {ready.get('message', '')}",
                "Mend the field that is named and apply it again; until then KubeRay does nothing "
                "about it, and what ran before goes on.",
            )
    for ray_cluster in cluster.list("rayclusters.ray.io", everywhere=False):
        conditions = {
            one["type"]: one for one in (ray_cluster.get("status") or {}).get("conditions") or []
        }
        failure = conditions.get("ReplicaFailure", {})
        if failure.get("status") == "True":
            yield failed(
                f"RayCluster {ray_cluster['metadata']['name']}",
                f"its pods cannot be made: {failure.get('reason', '')} "
                f"{failure.get('message', '')}".strip(),
                "The API server refuses the pod template: mend the field that is named (a "
                "toleration's effect, for example), a quota, or an admission rule.",
            )


def check_services(cluster: Cluster) -> Iterator[Finding]:
    """Whether the RayServices of the namespace serve; what keeps them from it has its own rows."""
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
                "The operator has not looked at it: look again, then at the operator's log and at "
                "`kubectl describe rayservice`.",
            )
        elif ready.get("reason") == _TIMED_OUT:
            yield _timed_out(check, service, ready)
        elif broken:
            yield failed(
                check,
                "; ".join(text.strip().rstrip(":") for text in broken),
                "Mend the Serve config (`diffusion-serve check`) or what the message names; `serve "
                "status` in the head pod shows all of it.",
            )
        elif ready.get("status") == "True":
            yield ok(check, "ready")
        else:
            yield failed(
                check,
                f"not ready: {ready.get('reason', '')} {ready.get('message', '')}".strip(),
                "It waits for what has failed above. If nothing has, it is still starting: the "
                "log of the head's pod and `kubectl describe rayservice` say how far it is.",
            )


def _timed_out(check: str, service: Object, ready: Object) -> Finding:
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    limit = (service["metadata"].get("annotations") or {}).get(_TIMEOUT)
    return failed(
        check,
        f"{_TIMED_OUT}: {ready.get('message', '')}".rstrip(": "),
        f"It was not ready within {_TIMEOUT}{f' ({limit})' if limit else ''}, and has failed for "
        "good: KubeRay deletes its Ray clusters and looks at it no more, whatever is applied. "
        "First mend the cause: what else has failed here, or the last events of its pods; if it "
        "only took long, raise the annotation. Then delete it and apply it again:\n"
        f"  kubectl -n {namespace} get events --sort-by=.lastTimestamp\n"
        f"  kubectl -n {namespace} delete rayservice {name}",
    )
