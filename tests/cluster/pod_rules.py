"""Rules about pods: volumes, nodes, Ray's variables, privileges."""

from collections.abc import Iterator
from pathlib import Path

from kubernetes.utils.quantity import parse_quantity

from tests.cluster.manifests import Manifests, Pod
from tests.cluster.parts import gpus_of, is_gpu, variables
from tests.cluster.secret_rules import SECRETS


def volumes_exist(manifests: Manifests) -> Iterator[str]:
    claims = {one["metadata"]["name"] for one in manifests.of_kind("PersistentVolumeClaim")}
    for pod in manifests.pods:
        volumes = {one["name"]: one for one in pod.spec.get("volumes", [])}
        for volume in volumes.values():
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim is not None and claim not in claims:
                yield (
                    f"{pod.where}.volumes[{volume['name']}]: no PersistentVolumeClaim {claim} is "
                    f"applied with it ({manifests.written_in(pod, 'claimName')})"
                )
        for container in pod.containers:
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in {*volumes, *_claim_templates(pod)}:
                    yield (
                        f"{pod.where}.containers[{container['name']}].volumeMounts: no volume "
                        f"{mount['name']} ({manifests.written_in(pod, 'volumeMounts')})"
                    )
        # Ray, Redis and tempfile write there, and the root is read-only.
        mounts = [one["mountPath"] for one in pod.spec["containers"][0].get("volumeMounts", [])]
        is_ray = pod.document["kind"] == "RayService"
        cache = ["/cache/huggingface"] if pod.group is not None else []  # the image's VOLUME
        for path in ["/tmp", *cache] if is_ray else []:
            if path not in mounts:
                yield (
                    f"{pod.where}.containers[0].volumeMounts: nothing at {path} "
                    f"({manifests.written_in(pod, 'volumeMounts')})"
                )
        keys = variables(pod.spec["containers"][0]).get("DIFFUSION_SERVE_KEYS_PATH")
        if keys is not None and (
            str(Path(keys).parent) not in mounts or Path(keys).name not in SECRETS["api-keys"]
        ):
            file = manifests.written_in(pod, "DIFFUSION_SERVE_KEYS_PATH")
            yield (
                f"{pod.where}.containers[0].env.DIFFUSION_SERVE_KEYS_PATH is {keys}, which is "
                f"not the mounted Secret's ({file})"
            )


def _claim_templates(pod: Pod) -> set[str]:
    templates = pod.document["spec"].get("volumeClaimTemplates", [])
    return {one["metadata"]["name"] for one in templates}


def worker_groups_are_alike(manifests: Manifests) -> Iterator[str]:
    """Whoever copies a group copies it as it is by then; a later patch reaches the first only."""
    groups = [pod for pod in manifests.pods if pod.group is not None]
    with_gpu = [pod for pod in groups if gpus_of(pod)]
    for pod in groups:
        runtime = pod.spec.get("runtimeClassName")
        if runtime is not None and pod not in with_gpu:
            yield (
                f"{pod.where}.runtimeClassName is {runtime}, for pods without a GPU: apply "
                f"runtime-class after scale-to-zero "
                f"({manifests.written_in(pod, 'runtimeClassName')})"
            )
    for pod in with_gpu[1:]:
        for field in ("runtimeClassName", "volumes"):
            if pod.spec.get(field) != with_gpu[0].spec.get(field):
                yield (
                    f"{pod.where}.{field} differs from group {with_gpu[0].group}'s: apply what "
                    f"changes it before what copies the group ({manifests.written_in(pod, field)})"
                )


def pods_fit_their_nodes(manifests: Manifests) -> Iterator[str]:
    """Nodes with a product that they name; else all that have what they ask for."""
    nodes = {one["product"]: one for one in manifests.expected["nodes"]}
    for pod in manifests.pods:
        named = _products(pod)
        for product in named:
            if product not in nodes:
                yield (
                    f"{pod.where}.affinity: the product {product} is not in "
                    f"cluster/platform/nodes.yaml ({manifests.written_in(pod, product)})"
                )
        requests = pod.spec["containers"][0].get("resources", {}).get("requests", {})
        gpu = next(filter(is_gpu, requests), None)
        if gpu is None:
            continue
        chosen = [one for one in nodes.values() if not named or one["product"] in named]
        having = [one for one in chosen if gpu in one["allocatable"]]
        if chosen and not having:
            yield (
                f"{pod.where}.containers[0].resources: no nodes with {', '.join(named) or 'a GPU'} "
                f"have {gpu} (cluster/platform/nodes.yaml; {manifests.written_in(pod, gpu)})"
            )
        for node in having:
            room = node["allocatable"]
            pods = parse_quantity(room[gpu]) // parse_quantity(requests[gpu])
            for name in ("cpu", "memory"):
                wanted = pods * parse_quantity(requests[name])
                wanted += parse_quantity(manifests.expected["daemons"][name])
                if not pods or wanted > parse_quantity(room[name]):
                    yield (
                        f"{pod.where}.containers[0].resources.requests.{name} is {requests[name]}: "
                        f"{pods} such pods and the daemons do not fit into {room[name]} of "
                        f"{node['machine']} (cluster/platform/nodes.yaml; "
                        f"{manifests.written_in(pod, name, requests[name])})"
                    )


def _products(pod: Pod) -> list[str]:
    affinity = pod.spec.get("affinity", {}).get("nodeAffinity", {})
    terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {})
    return [
        product
        for term in terms.get("nodeSelectorTerms", [])
        for expression in term["matchExpressions"]
        if expression["key"] == "nvidia.com/gpu.product"
        for product in expression["values"]
    ]


def pods_leave_ray_alone(manifests: Manifests) -> Iterator[str]:
    """KubeRay makes new pods itself, and Ray drains on SIGTERM."""
    for pod in manifests.pods:
        if pod.document["kind"] != "RayService":
            continue
        if (policy := pod.spec.get("restartPolicy", "Never")) != "Never":
            yield (
                f"{pod.where}.restartPolicy is {policy}: leave it out "
                f"({manifests.written_in(pod, 'restartPolicy')})"
            )
        if "preStop" in pod.spec["containers"][0].get("lifecycle", {}):
            yield (
                f"{pod.where}.containers[0].lifecycle.preStop: leave it out, or requests are "
                f"cut off ({manifests.written_in(pod, 'preStop')})"
            )


def nobody_is_privileged(manifests: Manifests) -> Iterator[str]:
    """Kubernetes' pod security standard "restricted", which the namespace enforces."""
    for pod in manifests.pods:
        whole = pod.spec.get("securityContext", {})
        if whole.get("runAsNonRoot") is not True:
            yield (
                f"{pod.where}.securityContext.runAsNonRoot is {whole.get('runAsNonRoot')}: write "
                f"true ({manifests.written_in(pod, 'runAsNonRoot')})"
            )
        if whole.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield (
                f"{pod.where}.securityContext.seccompProfile.type: write RuntimeDefault "
                f"({manifests.written_in(pod, 'seccompProfile')})"
            )
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.spec.get(field):
                yield f"{pod.where}.{field}: leave it out ({manifests.written_in(pod, field)})"
        if not whole.get("runAsUser"):
            yield (
                f"{pod.where}.securityContext.runAsUser is {whole.get('runAsUser')}: write another "
                f"than root's ({manifests.written_in(pod, 'runAsUser')})"
            )
        contexts = [(one["name"], one.get("securityContext", {})) for one in pod.containers]
        if pod is manifests.pods[0]:
            autoscaler = manifests.cluster.get("autoscalerOptions", {})
            contexts.append(("autoscaler", autoscaler.get("securityContext", {})))
        for name, context in contexts:
            if context.get("privileged"):
                yield (
                    f"{pod.where}.containers[{name}].securityContext.privileged: leave it out "
                    f"({manifests.written_in(pod, 'privileged')})"
                )
            for field, wanted in {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }.items():
                if context.get(field) != wanted:
                    yield (
                        f"{pod.where}.containers[{name}].securityContext.{field} is "
                        f"{context.get(field)}: write {wanted} ({manifests.written_in(pod, field)})"
                    )
        if pod.group is not None and pod.spec.get("automountServiceAccountToken") is not False:
            file = manifests.written_in(pod, "automountServiceAccountToken")
            yield (
                f"{pod.where}.automountServiceAccountToken: write false: a replica has nothing to "
                f"ask of the API server ({file})"
            )
