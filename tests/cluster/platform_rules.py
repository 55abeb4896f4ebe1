"""Rules about cluster/platform/, which is not rendered: values files, manifests, and the order in
which the page about Kubernetes installs them.

Charts are not read: this file names the values that place pods.
"""

import re
import shlex
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from serve_app.doctor.placement import untolerated
from tests.cluster.manifests import Manifests
from tests.cluster.schemas import check_schema
from tests.pages import KUBERNETES, section

FOLDER = "cluster/platform"
SECTION = "Prepare the cluster"
"""Section of the page with the commands."""

DAEMONS = {
    "nvidia-device-plugin.yaml": ("tolerations", "nfd.worker.tolerations"),
    "dcgm-exporter.yaml": ("tolerations",),
}
"""Values files of what must run on every GPU node, and the fields by which it gets there."""


def daemons_reach_their_nodes(manifests: Manifests) -> Iterator[str]:
    node = {"spec": {"taints": manifests.expected["taints"]}}
    for name, fields in DAEMONS.items():
        values = yaml.safe_load((manifests.root / FOLDER / name).read_text())
        for field in fields:
            tolerations = reduce(lambda part, key: part.get(key, {}), field.split("."), values)
            for taint in untolerated({"tolerations": tolerations}, node):
                yield (
                    f"{name}: {field}: nothing tolerates {taint['key']}={taint.get('value', '')}:"
                    f"{taint['effect']}, which GPU nodes carry ({FOLDER}/nodes.yaml; "
                    f"{FOLDER}/{name})"
                )


def platform_keeps_its_schemas(manifests: Manifests) -> Iterator[str]:
    for file, document in _documents(manifests):
        for path, message in check_schema(document):
            yield f"{document['kind']}/{document['metadata']['name']}: {path}: {message} ({file})"


def platform_gives_what_pods_name(manifests: Manifests) -> Iterator[str]:
    """Check the RuntimeClass, and the resources of MIG instances."""
    [runtime] = [
        document["metadata"]["name"]
        for _, document in _documents(manifests)
        if document["kind"] == "RuntimeClass"
    ]
    said = re.findall(r'runtimeClassName(?:=|": ")([\w-]+)', _page(manifests))
    for name in said:
        if name != runtime:
            yield f"runtimeClassName {name} is not {runtime} ({KUBERNETES})"
    values = yaml.safe_load((manifests.root / FOLDER / "nvidia-device-plugin.yaml").read_text())
    for pod in manifests.pods:
        if (name := pod.spec.get("runtimeClassName", runtime)) != runtime:
            yield (
                f"{pod.where}.runtimeClassName is {name}, and the platform's is {runtime} "
                f"({manifests.written_in(pod, 'runtimeClassName', name)})"
            )
        limits = pod.spec["containers"][0].get("resources", {}).get("limits", {})
        for resource in limits:
            if resource.startswith("nvidia.com/mig-") and values.get("migStrategy") != "mixed":
                yield (
                    f"{pod.where}.containers[0].resources: {resource} is there only with "
                    f"migStrategy mixed ({FOLDER}/nvidia-device-plugin.yaml)"
                )


def platform_is_installed_in_order(manifests: Manifests) -> Iterator[str]:
    """Check that each command of the page has its prerequisites installed before it."""
    installed: set[str] = set()
    used = {"nodes.yaml"}
    for words in map(shlex.split, _commands(_page(manifests))):
        files = [word for word in words if word.startswith(f"{FOLDER}/")]
        used |= {Path(file).name for file in files}
        for file in files:
            if not (manifests.root / file).is_file():
                yield f"there is no {file} ({KUBERNETES})"
                continue
            text = (manifests.root / file).read_text()
            if "kind: GatewayClass" in text and "envoy-gateway" not in installed:
                yield f"GatewayClass needs envoy-gateway before it ({file}; {KUBERNETES})"
            if words[0] != "helm":
                continue
            if _has_monitor(yaml.safe_load(text)) and "kube-prometheus-stack" not in installed:
                yield (
                    f"serviceMonitor needs kube-prometheus-stack, installed before it "
                    f"({file}; {KUBERNETES})"
                )
            version = words[words.index("--version") + 1]
            first = f"# helm: {words[3].rpartition('/')[2]} {version}"
            if text.partition("\n")[0] != first:
                yield f"its first line is not `{first}`, of the chart that gets it ({file})"
        match words[:3]:
            case ["helm", "install", release]:
                installed.add(release)
            case ["helm", "upgrade", release] if release not in installed:
                yield f"{release} is upgraded before it is installed ({KUBERNETES})"
    for file in sorted((manifests.root / FOLDER).glob("*.yaml")):
        if file.name not in used:
            yield f"no command of {KUBERNETES} names {FOLDER}/{file.name}"


def _documents(manifests: Manifests) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted((manifests.root / FOLDER).glob("*.yaml")):
        for document in yaml.safe_load_all(file.read_text()):
            if "apiVersion" in document:  # neither values nor nodes.yaml
                yield f"{FOLDER}/{file.name}", document


def _page(manifests: Manifests) -> str:
    return section(manifests.root, KUBERNETES, SECTION)


def _commands(text: str) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(("helm ", "kubectl ", "sed "))]


def _has_monitor(values: Any) -> bool:
    if not isinstance(values, dict):
        return False
    monitor = values.get("serviceMonitor")
    on = isinstance(monitor, dict) and bool(monitor.get("enabled"))
    return on or any(_has_monitor(child) for child in values.values())
