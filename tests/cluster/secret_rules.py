"""Rules about Secrets: references, and the steps that create them."""

import re
from collections.abc import Iterator
from typing import Any

from tests.cluster.manifests import Document, Manifests
from tests.cluster.parts import variables
from tests.pages import KUBERNETES

SECRETS = {
    "api-keys": {"keys.yaml"},
    "hugging-face": {"token"},
    "prometheus-api-key": {"key"},
    "ray-auth-token": {"auth_token"},
    "redis": {"password"},
    "diffusion-serve-tls": {"tls.crt", "tls.key"},
}
"""Secrets of the page about Kubernetes, with their keys."""

OPTIONAL_SECRETS = {"hugging-face"}
"""Secrets without which pods start."""

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
                f"{where}: the Secret {name}, key {key}, is none of those that {KUBERNETES} "
                f"lists ({manifests.written_in(document, name)})"
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
    """Require that the page creates keys, then Secrets, before it applies the overlay."""
    text = (manifests.root / KUBERNETES).read_text()
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
                f"`{applied.strip()}` ({KUBERNETES})"
            )
    if steps.rfind("> keys.yaml") > steps.find("--from-file=keys.yaml") >= 0:
        yield f"a key is written to keys.yaml after the Secret api-keys was made ({KUBERNETES})"
