"""Rules across the files of cluster/ and configs/, beyond the schema of each.

A rule yields each problem: the field, its value, the right value, and the file to edit.
"""

import re
import tomllib
from collections.abc import Callable, Iterator
from decimal import Decimal

from kubernetes.utils.quantity import parse_quantity
from packaging.requirements import Requirement
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from serve_app import __version__
from serve_app.autoscaling.params import read_scaling_params
from serve_app.config.deployment_names import GATEWAY
from serve_app.config.models import parse_app_config
from serve_app.config.serve_file import policy_kwargs
from serve_app.doctor.placement import untolerated
from serve_app.doctor.selectors import NO_GATEWAY, placed, selects
from serve_app.errors import ConfigError
from tests.cluster.application import Deployed, application, config_file
from tests.cluster.interruption_rules import budgets_select_pods, graces_are_in_order
from tests.cluster.manifests import Document, Manifests
from tests.cluster.network_rules import (
    neighbours_are_reached,
    ports_have_one_name,
    the_application_is_read_once,
    the_way_in_is_wide_enough,
)
from tests.cluster.operator_rules import the_operator_accepts
from tests.cluster.parts import PORTS, ROOT, gpus_of, group_path, is_gpu, worker
from tests.cluster.platform_rules import (
    daemons_reach_their_nodes,
    platform_gives_what_pods_name,
    platform_is_installed_in_order,
    platform_keeps_its_schemas,
)
from tests.cluster.pod_rules import (
    nobody_is_privileged,
    pods_fit_their_nodes,
    pods_leave_ray_alone,
    volumes_exist,
    worker_groups_are_alike,
)
from tests.cluster.schemas import check_schema
from tests.cluster.secret_rules import secrets_are_made_first, secrets_are_referred_to

Rule = Callable[[Manifests], Iterator[str]]


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
            f"{group_path(name, 'groupName')} is there {names.count(name)} times: components that "
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
    config, deployed = application(manifests)
    gateway = deployed[GATEWAY]
    for name in config.generators:
        generator = deployed[name]
        there = Decimal(0)
        for group in _groups_with_gpus(manifests, generator) if generator.gpus else ():
            pod = worker(manifests, group["groupName"])
            fitting = gpus_of(pod) // generator.gpus
            there += fitting * group["maxReplicas"]
            cpu = parse_quantity(pod.spec["containers"][0]["resources"]["requests"]["cpu"])
            wanted = fitting * generator.cpus + gateway.cpus
            if cpu < wanted:
                file = manifests.written_in(pod, "workerGroupSpecs", "cpu")
                yield (
                    f"{group_path(group['groupName'], 'template')}: requests.cpu is {cpu}, and "
                    f"{fitting} replicas of {name} and a gateway need {wanted} ({file})"
                )
        if generator.gpus and generator.max_replicas > there:
            yield (
                f"RayService/diffusion-serve: spec.serveConfigV2: max_replicas of {name} is "
                f"{generator.max_replicas} ({config_file(manifests)}), and the worker groups' "
                f"maxReplicas bring GPUs for {there} "
                f"({manifests.written_in(manifests.service, 'maxReplicas')})"
            )


def _groups_with_gpus(manifests: Manifests, generator: Deployed) -> list[Document]:
    """Return the worker groups with GPUs that can take the generator's replicas."""
    return [
        group
        for group in manifests.worker_groups
        if gpus_of(worker(manifests, group["groupName"]))
        and selects(generator.selector, group.get("labels", {}))
    ]


def pinned_replicas_have_one_group(manifests: Manifests) -> Iterator[str]:
    """Of each deployment, and of one with a label selector of its own no more than one."""
    for one in placed(manifests.service):
        pinned = one.deployment != GATEWAY and one.selector
        if len(one.groups) == 1 or (one.groups and not pinned):
            continue
        names = " and ".join(path.rpartition(".")[2] for path in one.groups) or "no group"
        file = manifests.written_in(manifests.service, *(one.selector or ["groupName"]))
        yield (
            f"RayService/diffusion-serve: spec.serveConfigV2: {one.deployment} wants {one.wanted} "
            f"({config_file(manifests)}), which {names} has: make it one ({file})"
        )


def groups_have_room(manifests: Manifests) -> Iterator[str]:
    config, deployed = application(manifests)
    for group in manifests.worker_groups:
        least, most = group["minReplicas"], group["maxReplicas"]
        if least > most:
            yield (
                f"{group_path(group['groupName'], 'minReplicas')} is {least}, over maxReplicas, "
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
                f"{group_path(group['groupName'], 'rayStartParams')}.num-gpus is set, and its "
                f"pods have no GPU ({manifests.written_in(manifests.service, 'num-gpus')})"
            )
    for name in config.generators:
        generator = deployed[name]
        its_groups = _groups_with_gpus(manifests, generator)
        floor = any(group["minReplicas"] for group in its_groups)
        if its_groups and not floor and generator.min_replicas:
            file = manifests.written_in(manifests.service, "minReplicas")
            yield (
                f"RayService/diffusion-serve: spec.serveConfigV2: min_replicas of {name} is "
                f"{generator.min_replicas} ({config_file(manifests)}), so the worker groups with "
                f"GPUs, whose minReplicas is 0 ({file}), never get empty"
            )


def requests_equal_limits(manifests: Manifests) -> Iterator[str]:
    """Of GPUs, as Kubernetes demands, and of memory, which Ray takes from the limit."""
    for pod in manifests.pods:
        for container in pod.containers:
            resources = container.get("resources", {})
            requests, limits = resources.get("requests", {}), resources.get("limits", {})
            names = {name for name in {*requests, *limits} if is_gpu(name)} | {"memory"}
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


RULES: list[Rule] = [
    schema_is_kept,
    groups_have_one_name,
    serve_config_is_right,
    the_operator_accepts,
    serve_is_reached,
    gpus_suffice,
    pinned_replicas_have_one_group,
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
    """Check all rules; those that read the Serve config run only if it is valid."""
    first = [line for rule in RULES[:3] for line in rule(manifests)]
    return first or [line for rule in RULES[3:] for line in rule(manifests)]
