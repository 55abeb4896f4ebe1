"""What must be true across the files of cluster/ and configs/, beyond the schema of each.

A rule is a generator of what is wrong: the field, its value, what it should be, and the file where
it is written.
"""

import re
import tomllib
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from kubernetes.utils.quantity import parse_quantity
from packaging.requirements import Requirement
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from serve_app import __version__
from serve_app.autoscaling.params import read_scaling_params
from serve_app.config.models import parse_app_config
from serve_app.config.serve_file import policy_kwargs
from serve_app.doctor.deadlines import NO_GATEWAY
from serve_app.doctor.placement import untolerated
from serve_app.errors import ConfigError
from tests.cluster.application import application, config_file
from tests.cluster.interruption_rules import budgets_select_pods, graces_are_in_order
from tests.cluster.manifests import Document, Manifests, Pod
from tests.cluster.operator_rules import the_operator_accepts
from tests.cluster.platform_rules import (
    daemons_reach_their_nodes,
    platform_gives_what_pods_name,
    platform_is_installed_in_order,
    platform_keeps_its_schemas,
)
from tests.cluster.schemas import check_schema

ROOT = Path(__file__).parents[2]

Rule = Callable[[Manifests], Iterator[str]]

HEADERS = {"x-request-timeout-seconds", "x-request-disconnect-disabled"}
"""By which clients would control Serve's proxies."""

PORTS = {
    "serve": 8000,
    "metrics": 8080,
    "dashboard": 8265,
    "dashboard-agent": 52365,
    "redis": 6379,
    "https": 443,
    "dns": 53,
    "kubernetes": 6443,
    "otlp": 4318,
}
"""One name, one number: ours, Ray's, and those that pods call."""

SECRETS = {
    "api-keys": {"keys.yaml"},
    "hugging-face": {"token"},
    "prometheus-api-key": {"key"},
    "ray-auth-token": {"auth_token"},
    "redis": {"password"},
    "diffusion-serve-tls": {"tls.crt", "tls.key"},
}
"""Those that cluster/README.md says how to make, with their keys."""

OPTIONAL_SECRETS = {"hugging-face"}
"""Pods start without them."""


# What the parts of a rendered overlay say.


def gpus_of(pod: Pod) -> Decimal:
    """That it asks for, whole or in MIG instances."""
    limits = pod.spec["containers"][0].get("resources", {}).get("limits", {})
    return sum(
        (parse_quantity(number) for name, number in limits.items() if _is_gpu(name)), Decimal(0)
    )


def _is_gpu(resource: str) -> bool:
    return resource.startswith("nvidia.com/")


def worker(manifests: Manifests, group: str) -> Pod:
    [pod] = [pod for pod in manifests.pods if pod.group == group]
    return pod


def variables(container: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one.get("value", "") for one in container.get("env", [])}


def _group_path(group: str, field: str) -> str:
    return f"RayService/diffusion-serve: spec.rayClusterConfig.workerGroupSpecs[{group}].{field}"


# The rules.


def schema_is_kept(manifests: Manifests) -> Iterator[str]:
    for document in manifests.documents:
        name = f"{document['kind']}/{document['metadata']['name']}"
        for path, message in check_schema(document):
            unknown = re.search(r"'([^']+)' (?:was|were) unexpected", message)
            words = [unknown[1] if unknown else path.rpartition(".")[2]]
            words += [group for group in ("headGroupSpec", "workerGroupSpecs") if group in path]
            yield f"{name}: {path}: {message} ({manifests.written_in(document, *words)})"


def groups_have_one_name(manifests: Manifests) -> Iterator[str]:
    names = [group["groupName"] for group in manifests.worker_groups]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield (
            f"{_group_path(name, 'groupName')} is there {names.count(name)} times: components that "
            f"copy a group exclude each other "
            f"({manifests.written_in(manifests.service, 'groupName')})"
        )


def serve_config_is_right(manifests: Manifests) -> Iterator[str]:
    where = "RayService/diffusion-serve: spec.serveConfigV2"
    if not manifests.serve:
        file = (manifests.folder / "kustomization.yaml").relative_to(manifests.root)
        yield f"{where} is empty: copy one of configs/ into it by replacements ({file})"
        return
    try:
        ServeDeploySchema.model_validate(manifests.serve)
    except ValidationError as error:
        for one in error.errors():
            field = ".".join(str(part) for part in one["loc"])
            yield f"{where}.{field}: {one['msg']} ({config_file(manifests)})"
    for one in manifests.serve.get("applications", []):
        try:
            parse_app_config(one.get("args", {}))
            for deployment in one.get("deployments", []):
                read_scaling_params(policy_kwargs(deployment.get("autoscaling_config") or {}))
        except ConfigError as error:
            yield f"{where}: {error} ({config_file(manifests)})"


def serve_is_reached(manifests: Manifests) -> Iterator[str]:
    """KubeRay's readiness probe and its Service ask each worker on the port of Serve."""
    options = manifests.serve.get("http_options", {})
    where = "RayService/diffusion-serve: spec.serveConfigV2"
    file = config_file(manifests)
    if (host := options.get("host", "0.0.0.0")) != "0.0.0.0":
        yield (
            f"{where}.http_options.host is {host}, where no other pod reaches it: write 0.0.0.0 "
            f"({file})"
        )
    if (port := options.get("port", 8000)) != PORTS["serve"]:
        yield f"{where}.http_options.port is {port}, and the pods' is {PORTS['serve']} ({file})"
    if (location := manifests.serve.get("proxy_location", "EveryNode")) != "EveryNode":
        yield f"{where}.proxy_location is {location}: workers need EveryNode to get ready ({file})"


def gpus_suffice(manifests: Manifests) -> Iterator[str]:
    _, deployed = application(manifests)
    generator, gateway = deployed["Generator"], deployed["Gateway"]
    file = config_file(manifests)
    field = "spec.serveConfigV2: max_replicas of Generator"
    if not generator.gpus:
        return
    there = Decimal(0)
    for group in manifests.worker_groups:
        name, pod = group["groupName"], worker(manifests, group["groupName"])
        if not (gpus := gpus_of(pod)):
            continue
        fitting = gpus // generator.gpus
        there += fitting * group["maxReplicas"]
        cpu = parse_quantity(pod.spec["containers"][0]["resources"]["requests"]["cpu"])
        wanted = fitting * generator.cpus + gateway.cpus
        if cpu < wanted:
            file = manifests.written_in(pod, "workerGroupSpecs", "cpu")
            yield (
                f"{_group_path(name, 'template')}: requests.cpu is {cpu}, and {fitting} replicas "
                f"and a gateway need {wanted} ({file})"
            )
    if generator.max_replicas > there:
        yield (
            f"RayService/diffusion-serve: {field} is {generator.max_replicas} ({file}), and the "
            f"worker groups' maxReplicas bring GPUs for {there} "
            f"({manifests.written_in(manifests.service, 'maxReplicas')})"
        )


def groups_have_room(manifests: Manifests) -> Iterator[str]:
    _, deployed = application(manifests)
    for group in manifests.worker_groups:
        least, most = group["minReplicas"], group["maxReplicas"]
        if least > most:
            yield (
                f"{_group_path(group['groupName'], 'minReplicas')} is {least}, over maxReplicas, "
                f"{most} ({manifests.written_in(manifests.service, 'minReplicas')})"
            )
    if all(
        group.get("labels", {}).items() >= NO_GATEWAY.items() for group in manifests.worker_groups
    ):
        file = manifests.written_in(manifests.service, "diffusion-serve/gateway")
        yield (
            f"RayService/diffusion-serve: all workerGroupSpecs carry the label {NO_GATEWAY}: there "
            f"is no place for a gateway ({file})"
        )
    with_gpu = [g for g in manifests.worker_groups if gpus_of(worker(manifests, g["groupName"]))]
    for group in manifests.worker_groups:
        if "num-gpus" in group.get("rayStartParams", {}) and group not in with_gpu:
            yield (
                f"{_group_path(group['groupName'], 'rayStartParams')}.num-gpus is set, and its "
                f"pods have no GPU ({manifests.written_in(manifests.service, 'num-gpus')})"
            )
    generator = deployed["Generator"]
    if with_gpu and not any(group["minReplicas"] for group in with_gpu) and generator.min_replicas:
        file = manifests.written_in(manifests.service, "minReplicas")
        yield (
            f"RayService/diffusion-serve: spec.serveConfigV2: min_replicas of Generator is "
            f"{generator.min_replicas} ({config_file(manifests)}), so the worker groups with "
            f"GPUs, whose minReplicas is 0 ({file}), never get empty"
        )


def requests_equal_limits(manifests: Manifests) -> Iterator[str]:
    """Of GPUs, as Kubernetes demands, and of memory, which Ray takes from the limit."""
    for pod in manifests.pods:
        for container in pod.containers:
            resources = container.get("resources", {})
            requests, limits = resources.get("requests", {}), resources.get("limits", {})
            names = {name for name in {*requests, *limits} if _is_gpu(name)} | {"memory"}
            for name in sorted(names):
                if requests.get(name) != limits.get(name) or name not in limits:
                    yield (
                        f"{pod.where}.containers[{container['name']}].resources: request of {name} "
                        f"is {requests.get(name)}, limit {limits.get(name)}; both are needed, and "
                        f"equal ({manifests.written_in(pod, name)})"
                    )


def tolerations_fit_the_taints(manifests: Manifests) -> Iterator[str]:
    for pod in manifests.pods:
        for toleration in pod.spec.get("tolerations", []):
            if toleration.get("effect", "NoSchedule") not in (
                "NoSchedule",
                "PreferNoSchedule",
                "NoExecute",
            ) or toleration.get("operator", "Equal") not in ("Equal", "Exists"):
                yield (
                    f"{pod.where}.tolerations: {toleration} is none that Kubernetes knows "
                    f"({manifests.written_in(pod, 'tolerations')})"
                )
        selected = pod.spec.get("nodeSelector", {})
        on_gpu_nodes = gpus_of(pod) or "nvidia.com/gpu.present" in selected
        met = [
            taint
            for taint in manifests.expected["taints"]
            if (on_gpu_nodes if taint["key"] == "nvidia.com/gpu" else taint["key"] in selected)
        ]
        for taint in untolerated(pod.spec, {"spec": {"taints": met}}):
            yield (
                f"{pod.where}.tolerations: nothing tolerates {taint['key']}={taint['value']}:"
                f"{taint['effect']}, which its nodes carry (cluster/platform/nodes.yaml; "
                f"{manifests.written_in(pod, 'tolerations')})"
            )


def versions_agree(manifests: Manifests) -> Iterator[str]:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [ray] = [one for one in map(Requirement, project["dependencies"]) if one.name == "ray"]
    version = manifests.cluster["rayVersion"]
    if version != pins["ray"] or version not in ray.specifier:
        file = manifests.written_in(manifests.service, "rayVersion")
        yield (
            f"RayService/diffusion-serve: spec.rayClusterConfig.rayVersion is {version} ({file}), "
            f"constraints.txt pins {pins['ray']}, and pyproject.toml wants {ray}"
        )
    for pod in manifests.pods:
        for container in pod.containers:
            name, _, tag = container["image"].rpartition(":")
            if name.rpartition("/")[2] != "diffusion-serve":
                continue
            pulls = any(one["command"] == ["true"] for one in pod.containers if "command" in one)
            wanted = f"{__version__}-{'gpu' if gpus_of(pod) or pulls else 'cpu'}"
            if tag != wanted:
                yield (
                    f"{pod.where}.containers[{container['name']}].image is {container['image']}, "
                    f"and this is {wanted} ({manifests.written_in(pod, f':{tag}')})"
                )


def images_are_pinned(manifests: Manifests) -> Iterator[str]:
    for pod in manifests.pods:
        for container in pod.containers:
            image = container["image"]
            tag = image.rpartition("/")[2].partition(":")[2]
            if "@sha256:" not in image and tag in ("", "latest"):
                yield (
                    f"{pod.where}.containers[{container['name']}].image is {image}: name a version "
                    f"({manifests.written_in(pod, image)})"
                )


def ports_have_one_name(manifests: Manifests) -> Iterator[str]:
    names = {number: name for name, number in PORTS.items()}

    def wrong(name: str | None, number: int, where: str, of: Pod | Document) -> Iterator[str]:
        if number not in names or (name is not None and PORTS.get(name) != number):
            yield (
                f"{where}: port {name or ''} {number} is not one of "
                f"{', '.join(f'{n} {p}' for n, p in PORTS.items())} "
                f"({manifests.written_in(of, str(number))})"
            )

    for pod in manifests.pods:
        for container in pod.containers:
            for port in container.get("ports", []):
                where = f"{pod.where}.containers[{container['name']}].ports"
                yield from wrong(port.get("name"), port["containerPort"], where, pod)
        if pod.group is not None:
            ports = pod.spec["containers"][0].get("ports", [])
            if {"name": "serve", "containerPort": PORTS["serve"]} not in ports:
                yield (
                    f"{pod.where}.containers[0].ports: no port serve, {PORTS['serve']} "
                    f"({manifests.written_in(pod, 'workerGroupSpecs', 'containerPort')})"
                )
    for document in manifests.documents:
        name = f"{document['kind']}/{document['metadata']['name']}"
        spec = document.get("spec", {})
        match document["kind"]:
            case "Service":
                for port in spec["ports"]:
                    yield from wrong(port["name"], port["port"], f"{name}: spec.ports", document)
            case "NetworkPolicy":
                for way in ("ingress", "egress"):
                    for rule in spec.get(way, []):
                        for port in rule.get("ports", []):
                            yield from wrong(None, port["port"], f"{name}: spec.{way}", document)
            case "HTTPRoute":
                for rule in spec["rules"]:
                    for backend in rule.get("backendRefs", []):
                        yield from wrong("serve", backend["port"], f"{name}: spec.rules", document)
            case "PodMonitor" | "ServiceMonitor":
                kind = document["kind"]
                field = "podMetricsEndpoints" if kind == "PodMonitor" else "endpoints"
                if field not in spec:
                    file = manifests.written_in(document, kind)
                    yield f"{name}: spec.{field} is missing ({file})"
                for endpoint in spec.get(field, []):
                    if endpoint["port"] not in PORTS:
                        yield (
                            f"{name}: port {endpoint['port']} is not one of {', '.join(PORTS)} "
                            f"({manifests.written_in(document, document['kind'])})"
                        )
                    for address in _addresses(endpoint):
                        number = int(address.rpartition(":")[2])
                        yield from wrong("serve", number, f"{name}: relabelings", document)


def _addresses(endpoint: dict[str, Any]) -> list[str]:
    """Of a monitor: what it asks instead of what was found."""
    relabelings = endpoint.get("relabelings", [])
    return [one["replacement"] for one in relabelings if one["targetLabel"] == "__address__"]


def the_application_is_read_once(manifests: Manifests) -> Iterator[str]:
    """A cluster: each gateway answers for all of it, and all would count it several times."""
    ray = [pod for pod in manifests.pods if pod.document["kind"] == "RayService"]
    monitors = manifests.of_kind("PodMonitor")
    of_application = []
    for monitor in monitors:
        where = f"PodMonitor/{monitor['metadata']['name']}: spec"
        file = manifests.written_in(monitor, "PodMonitor")
        labels = monitor["spec"]["selector"]["matchLabels"]
        own = {k: v for k, v in labels.items() if not k.startswith("ray.io/")}  # not KubeRay's
        if not all(own.items() <= pod.labels.items() for pod in ray):
            yield f"{where}.selector: {own} are not the labels of Ray's pods ({file})"
        if any(map(_addresses, monitor["spec"].get("podMetricsEndpoints", []))):
            of_application.append(monitor)
            if labels.get("ray.io/node-type") != "head":
                yield f"{where}.selector: write ray.io/node-type: head: there is one ({file})"
    if monitors and len(of_application) != 1:
        file = manifests.written_in(monitors[0], "PodMonitor")
        yield f"PodMonitor: {len(of_application)} of them read the application's /metrics ({file})"


_SECRET_NAME = re.compile(r"TOKEN|PASSWORD|SECRET|KEYS?$", re.IGNORECASE)


def secrets_are_referred_to(manifests: Manifests) -> Iterator[str]:
    for document in manifests.of_kind("Secret"):
        yield (
            f"Secret/{document['metadata']['name']}: make it in the cluster, not in a file "
            f"({manifests.written_in(document, 'kind: Secret')})"
        )
    for pod in manifests.pods:
        for container in pod.containers:
            for name, value in variables(container).items():
                if value and _SECRET_NAME.search(name):
                    yield (
                        f"{pod.where}.containers[{container['name']}].env.{name} has its value "
                        f"inline: refer to a Secret ({manifests.written_in(pod, name)})"
                    )
    for document, where, name, key in _secret_references(manifests):
        if name not in SECRETS or (key is not None and key not in SECRETS[name]):
            yield (
                f"{where}: the Secret {name}, key {key}, is none of those that cluster/README.md "
                f"tells how to make ({manifests.written_in(document, name)})"
            )


def _secret_references(
    manifests: Manifests,
) -> Iterator[tuple[Document, str, str, str | None]]:
    def walk(node: Any, where: str) -> Iterator[tuple[str, str, str | None]]:
        if isinstance(node, list):
            for child in node:
                yield from walk(child, where)
        elif isinstance(node, dict):
            if "secretKeyRef" in node:
                yield where, node["secretKeyRef"]["name"], node["secretKeyRef"]["key"]
            if "credentials" in node:  # of a monitor
                yield where, node["credentials"]["name"], node["credentials"]["key"]
            if "secretName" in node:
                yield where, node["secretName"], None
            for reference in node.get("certificateRefs", []):
                yield where, reference["name"], None
            for name, child in node.items():
                yield from walk(child, f"{where}.{name}")

    for document in manifests.documents:
        name = f"{document['kind']}/{document['metadata']['name']}"
        for found in walk(document.get("spec", {}), f"{name}: spec"):
            yield document, *found


def secrets_are_made_first(manifests: Manifests) -> Iterator[str]:
    """README.md makes what an overlay needs before it applies it, and keys before their Secret."""
    text = (manifests.root / "README.md").read_text()
    steps, applied, _ = text.partition(
        f"kubectl apply -k cluster/overlays/{manifests.folder.name}\n"
    )
    if not applied:
        return
    steps = steps[steps.rindex("```sh\n") :]
    needed = {name for _, _, name, _ in _secret_references(manifests)} - OPTIONAL_SECRETS
    for name in sorted(needed):
        made = re.search(rf"create secret generic {name}\s(.*\\\n)*.*", steps)
        keys = set(re.findall(r"--from-(?:file|literal)=([\w.]+)", made[0])) if made else set()
        if keys != SECRETS[name]:
            yield (
                f"the Secret {name}, keys {', '.join(sorted(SECRETS[name]))}, is not made before "
                f"`{applied.strip()}` (README.md)"
            )
    if steps.rfind("> keys.yaml") > steps.find("--from-file=keys.yaml") >= 0:
        yield "a key is written to keys.yaml after the Secret api-keys was made of it (README.md)"


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
        gpu = next(filter(_is_gpu, requests), None)
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


def neighbours_are_reached(manifests: Manifests) -> Iterator[str]:
    """Services, routes and policies name each other right, and the network lets them through."""
    name = manifests.service["metadata"]["name"]
    services = {one["metadata"]["name"]: one for one in manifests.of_kind("Service")}
    redis = manifests.cluster.get("gcsFaultToleranceOptions", {}).get("redisAddress")
    if redis is not None:
        host, _, port = redis.partition(":")
        ports = [
            str(one["port"]) for one in services.get(host, {"spec": {"ports": []}})["spec"]["ports"]
        ]
        if port not in ports:
            yield (
                f"RayService/{name}: spec.rayClusterConfig.gcsFaultToleranceOptions.redisAddress "
                f"is {redis}, and no such Service is applied with it "
                f"({manifests.written_in(manifests.service, 'redisAddress')})"
            )
    for route in manifests.of_kind("HTTPRoute"):
        for rule in route["spec"]["rules"]:
            for backend in rule.get("backendRefs", []):
                if backend["name"] not in {*services, f"{name}-serve-svc"}:
                    yield (
                        f"HTTPRoute/{route['metadata']['name']}: spec.rules.backendRefs: no "
                        f"Service {backend['name']} ({manifests.written_in(route, 'backendRefs')})"
                    )
    known = {(one["kind"], one["metadata"]["name"]) for one in manifests.documents}
    for route in manifests.of_kind("HTTPRoute"):
        for rule in route["spec"]["rules"]:
            for one in rule.get("filters", []):
                reference = one.get("extensionRef")
                if reference and (reference["kind"], reference["name"]) not in known:
                    yield (
                        f"HTTPRoute/{route['metadata']['name']}: spec.rules.filters: no "
                        f"{reference['kind']} {reference['name']} "
                        f"({manifests.written_in(route, 'extensionRef')})"
                    )
    if "upgradeStrategy" in manifests.service["spec"]:  # KubeRay's
        known |= {("Gateway", f"{name}-gateway"), ("HTTPRoute", f"{name}-httproute")}
    for policy in manifests.of_kind("BackendTrafficPolicy", "ClientTrafficPolicy"):
        for target in policy["spec"]["targetRefs"]:
            if (target["kind"], target["name"]) not in known:
                file = manifests.written_in(policy, "targetRefs")
                yield (
                    f"{policy['kind']}/{policy['metadata']['name']}: spec.targetRefs: no "
                    f"{target['kind']} {target['name']} ({file})"
                )
    ray = [pod for pod in manifests.pods if pod.document["kind"] == "RayService"]
    for policy in manifests.of_kind("NetworkPolicy"):
        where = f"NetworkPolicy/{policy['metadata']['name']}: spec"
        file = manifests.written_in(policy, "NetworkPolicy")
        chosen = policy["spec"]["podSelector"].get("matchLabels", {})
        if not all(chosen.items() <= pod.labels.items() for pod in ray):
            yield f"{where}.podSelector: {chosen} are not the labels of Ray's pods ({file})"
        for namespace, ports in {
            "kuberay-operator": {PORTS["dashboard"], PORTS["serve"]},
            "monitoring": {PORTS["metrics"], PORTS["serve"]},
        }.items():
            let_in = {
                port["port"]
                for rule in policy["spec"]["ingress"]
                for source in rule["from"]
                if "namespaceSelector" in source
                and source["namespaceSelector"]
                .get("matchLabels", {})
                .get("kubernetes.io/metadata.name", namespace)
                == namespace
                for port in rule.get("ports", [])
            }
            if missing := ports - let_in:
                yield f"{where}.ingress: {namespace} does not get to {sorted(missing)} ({file})"
        let_out = {
            port["port"] for rule in policy["spec"]["egress"] for port in rule.get("ports", [])
        }
        if missing := {PORTS["https"], PORTS["dns"], PORTS["otlp"]} - let_out:
            yield f"{where}.egress: pods do not get to {sorted(missing)} ({file})"


def the_way_in_is_wide_enough(manifests: Manifests) -> Iterator[str]:
    """Envoy's own limits are 15 s, and no bound of the body; clients' headers come through."""
    incremental = "upgradeStrategy" in manifests.service["spec"]
    routes = manifests.of_kind("HTTPRoute")
    if not routes and not incremental:
        return
    if routes and incremental:
        yield (
            "RayService/diffusion-serve: spec.upgradeStrategy: with incremental upgrades KubeRay "
            "makes Gateway and HTTPRoute itself; leave components/ingress out "
            f"({manifests.written_in(manifests.service, 'upgradeStrategy')})"
        )
    config, _ = application(manifests)
    limits = config.engine.limits
    longest_s = config.gateway.max_hold_s + limits.max_deadline_s
    timeouts, removed, sizes = [], set(), []
    for route in routes:
        closed = {
            match["path"]["value"]
            for rule in route["spec"]["rules"]
            if "backendRefs" not in rule
            for match in rule["matches"]
        }
        if "/metrics" not in closed:
            yield (
                f"HTTPRoute/{route['metadata']['name']}: spec.rules: /metrics is open to every API "
                f"key, and names all of them ({manifests.written_in(route, 'HTTPRoute')})"
            )
        for rule in route["spec"]["rules"]:
            if "backendRefs" not in rule:
                continue
            where = f"HTTPRoute/{route['metadata']['name']}: spec.rules.timeouts.request"
            timeouts.append((route, where, rule.get("timeouts", {}).get("request", "15s")))
            for one in rule.get("filters", []):
                removed |= set(one.get("requestHeaderModifier", {}).get("remove", []))
    for policy in manifests.of_kind("BackendTrafficPolicy"):
        where = f"BackendTrafficPolicy/{policy['metadata']['name']}: spec"
        if "timeout" in policy["spec"]:
            seconds = policy["spec"]["timeout"]["http"]["requestTimeout"]
            timeouts.append((policy, f"{where}.timeout.http.requestTimeout", seconds))
        limit = policy["spec"]["requestBuffer"]["limit"]
        sizes.append(limit)
        if parse_quantity(limit) < limits.max_upload_bytes:
            yield (
                f"{where}.requestBuffer.limit is {limit}, less than max_upload_bytes, "
                f"{limits.max_upload_bytes} ({manifests.written_in(policy, 'requestBuffer')})"
            )
    for policy in manifests.of_kind("ClientTrafficPolicy"):
        removed |= set(policy["spec"]["headers"]["earlyRequestHeaders"]["remove"])
    for document, where, seconds in timeouts:
        if float(seconds.removesuffix("s")) <= longest_s:
            yield (
                f"{where} is {seconds}, not over max_hold_s and max_deadline_s, {longest_s:g} "
                f"({manifests.written_in(document, seconds)})"
            )
    way_in = manifests.of_kind("Gateway", "ClientTrafficPolicy")
    for name in sorted(HEADERS - removed):
        file = manifests.written_in(way_in[0], "kind") if way_in else "components/ingress"
        yield f"the way in: the header {name} must be removed ({file})"
    if not timeouts or not sizes:
        yield "the way in: no timeout or no requestBuffer.limit (cluster/components/ingress)"


RULES: list[Rule] = [
    schema_is_kept,
    groups_have_one_name,
    serve_config_is_right,
    the_operator_accepts,
    serve_is_reached,
    gpus_suffice,
    groups_have_room,
    graces_are_in_order,
    requests_equal_limits,
    tolerations_fit_the_taints,
    versions_agree,
    images_are_pinned,
    ports_have_one_name,
    secrets_are_referred_to,
    secrets_are_made_first,
    volumes_exist,
    worker_groups_are_alike,
    pods_fit_their_nodes,
    pods_leave_ray_alone,
    nobody_is_privileged,
    budgets_select_pods,
    neighbours_are_reached,
    the_application_is_read_once,
    the_way_in_is_wide_enough,
    daemons_reach_their_nodes,
    platform_keeps_its_schemas,
    platform_gives_what_pods_name,
    platform_is_installed_in_order,
]


def problems(manifests: Manifests) -> list[str]:
    """Of all rules; those that read the Serve config only once it is right."""
    first = [line for rule in RULES[:3] for line in rule(manifests)]
    return first or [line for rule in RULES[3:] for line in rule(manifests)]
