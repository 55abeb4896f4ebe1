"""The objects that a rehearsal applies: the overlay, moved into a namespace of its own.

Pure: takes a rendered overlay, returns objects. Secrets that pods require get random values; the
real ones are neither read nor needed.
"""

import base64
import copy
import hashlib
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from serve_app.config.environment import KEYS_PATH_VARIABLE, KEYS_VARIABLE
from serve_app.doctor.kube import Object
from serve_app.doctor.secrets import references
from serve_app.errors import ConfigError

MARK = "app.kubernetes.io/managed-by"
MARKED = "diffusion-serve-rehearsal"
"""Label of the namespaces that a rehearsal may delete."""

CHANGE = "diffusion-serve/rehearsal"
"""Annotation that the upgrade adds to a pod template."""

_DRAWN_CHARS = 5
_NAME_CHARS = 63
"""The longest name of a namespace."""

_WAIT_LOOP_S = 2.0
"""Serve's default of graceful_shutdown_wait_loop_s."""


@dataclass(frozen=True)
class Manifest:
    """All objects that one rehearsal applies."""

    namespace: Object
    objects: tuple[Object, ...]
    """Objects to apply in this order: Secrets first, the RayService last."""
    only_checked: tuple[Object, ...]
    """Objects that act beyond the namespace: they are applied as a dry run."""
    service: Object
    """The RayService among ``objects``."""
    in_place: Object
    """The same with another Serve config."""
    upgraded: Object
    """The same with another pod template."""
    port: int
    """The port of Serve's proxies."""
    key: str | None
    """The API key of the created Secret; None if no Secret with keys was created."""
    made_secrets: tuple[str, ...]
    pull_secrets: tuple[str, ...]
    """Names of imagePullSecrets that the overlay does not bring."""

    @property
    def name(self) -> str:
        """The namespace's name."""
        return str(self.namespace["metadata"]["name"])


def prepare(
    overlay: Sequence[Object], source: str, in_namespace: Callable[[Object], bool | None]
) -> Manifest:
    """Move ``overlay``, read from ``source``, into a namespace with a new name.

    ``in_namespace`` returns whether an object's kind has namespaces; None if it is not served.

    Raises:
        ConfigError: if the overlay has several RayServices or namespaces, an object that the whole
            cluster shares, or a Serve config that names no deployment.
    """
    services = [one for one in overlay if one["kind"] == "RayService"]
    if len(services) != 1:
        names = ", ".join(one["metadata"]["name"] for one in services)
        raise ConfigError(f"{source} has several RayServices ({names}): rehearse one at a time.")
    old = services[0]["metadata"].get("namespace")
    own = next((one for one in overlay if one["kind"] == "Namespace"), None)
    inner = [one for one in overlay if one is not own]
    _check_scope(inner, source, old, in_namespace)

    drawn = secrets.token_hex(_DRAWN_CHARS)[:_DRAWN_CHARS]
    ending = f"-rehearsal-{drawn}"
    name = f"{old or services[0]['metadata']['name']}"[: _NAME_CHARS - len(ending)] + ending
    metadata = copy.deepcopy((own or {}).get("metadata") or {})
    metadata["name"] = name
    metadata["labels"] = (metadata.get("labels") or {}) | {MARK: MARKED}
    moved = [_moved(one, old, name) for one in inner]
    for one in moved:
        one["metadata"]["namespace"] = name

    applied = [one for one in moved if not _acts_beyond(one)]
    made, key = _missing_secrets(applied, name)
    service = next(one for one in applied if one["kind"] == "RayService")
    order = sorted(applied, key=lambda one: one is service)
    return Manifest(
        namespace={"apiVersion": "v1", "kind": "Namespace", "metadata": metadata},
        objects=(*made, *order),
        only_checked=tuple(one for one in moved if _acts_beyond(one)),
        service=service,
        in_place=_change_serve_config(service),
        upgraded=_change_cluster(service),
        port=_serve_port(service),
        key=key,
        made_secrets=tuple(one["metadata"]["name"] for one in made),
        pull_secrets=_missing_pull_secrets(applied),
    )


def _check_scope(
    objects: Sequence[Object],
    source: str,
    namespace: str | None,
    in_namespace: Callable[[Object], bool | None],
) -> None:
    shared = [
        f"{one['kind']} {one['metadata']['name']}" for one in objects if in_namespace(one) is False
    ]
    if shared:
        raise ConfigError(
            f"{source} has objects that the whole cluster shares ({', '.join(shared)}), and a "
            "rehearsal would overwrite them: render the overlay without them."
        )
    others = {str(one["metadata"].get("namespace") or namespace) for one in objects}
    if len(others | {str(namespace)}) > 1:
        raise ConfigError(
            f"{source} has objects for the namespaces {', '.join(sorted(others))}; a rehearsal has "
            "one namespace: give it objects of one."
        )


def _moved(value: Any, old: str | None, new: str) -> Any:
    """Return a copy in which each reference to the old namespace names the new one."""
    if old is None:
        return copy.deepcopy(value)
    if isinstance(value, dict):
        return {
            key: new
            if key in ("namespace", "kubernetes.io/metadata.name") and one == old
            else [new if entry == old else entry for entry in one]
            if key == "matchNames" and isinstance(one, list)
            else _moved(one, old, new)
            for key, one in value.items()
        }
    if isinstance(value, list):
        return [_moved(one, old, new) for one in value]
    if isinstance(value, str):
        return re.sub(rf"\.{re.escape(old)}\.svc\b", f".{new}.svc", value)
    return value


def _acts_beyond(one: Object) -> bool:
    """Return whether the object acts outside: on monitoring, DNS, a load balancer.

    A second set of alerts would fire, and a route with the real host name would compete for it.
    """
    group = one["apiVersion"].rpartition("/")[0]
    return (
        group in ("monitoring.coreos.com", "gateway.networking.k8s.io", "cert-manager.io")
        or one["kind"] == "Ingress"
        or (one["kind"] == "Service" and one.get("spec", {}).get("type") == "LoadBalancer")
    )


def _missing_secrets(objects: Sequence[Object], namespace: str) -> tuple[list[Object], str | None]:
    """Create the Secrets that the objects require and do not bring; return an API key of theirs."""
    brought = _brought(objects)
    key = None
    data: dict[str, dict[str, str]] = {}
    for name, entry in _key_holders(objects):
        if name not in brought:
            key = key or f"sk-{secrets.token_urlsafe(32)}"
            digest = hashlib.sha256(key.encode()).hexdigest()
            entries = [{"name": "rehearsal", "sha256": digest}]
            data.setdefault(name, {})[entry] = yaml.safe_dump(entries)
    required = [(one.secret, one.key) for one in references(objects) if not one.pulls_images]
    for name, known in sorted(set(required), key=lambda one: (one[0], one[1] is None, one[1])):
        # A pod that mounts a whole Secret starts with any entry.
        if name not in brought and (known is not None or name not in data):
            data.setdefault(name, {}).setdefault(known or "rehearsal", secrets.token_hex(16))
    made = [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "namespace": namespace},
            "data": {
                entry: base64.b64encode(value.encode()).decode() for entry, value in entries.items()
            },
        }
        for name, entries in data.items()
    ]
    return made, key


def _mappings(value: Any) -> Iterator[Object]:
    """Yield every mapping in ``value``, itself first."""
    if isinstance(value, dict):
        yield value
        for one in value.values():
            yield from _mappings(one)
    elif isinstance(value, list):
        for one in value:
            yield from _mappings(one)


def _key_holders(objects: Sequence[Object]) -> Iterator[tuple[str, str]]:
    """Yield the name and key of each Secret entry that is a list of API keys."""
    for pod in _mappings(list(objects)):
        if not isinstance(pod.get("containers"), list):
            continue
        names = {
            volume["name"]: volume["secret"].get("secretName")
            for volume in pod.get("volumes") or []
            if isinstance(volume.get("secret"), dict)
        }
        for container in pod["containers"]:
            for variable in container.get("env") or []:
                reference = (variable.get("valueFrom") or {}).get("secretKeyRef")
                if variable["name"] == KEYS_VARIABLE and reference:
                    yield reference["name"], reference["key"]
                if variable["name"] != KEYS_PATH_VARIABLE or "value" not in variable:
                    continue
                path = PurePosixPath(variable["value"])
                for mount in container.get("volumeMounts") or []:
                    name = names.get(mount["name"])
                    if name and path.is_relative_to(mount["mountPath"]):
                        yield name, str(path.relative_to(mount["mountPath"]))


def _missing_pull_secrets(objects: Sequence[Object]) -> tuple[str, ...]:
    """List the imagePullSecrets that the objects require and do not bring."""
    named = {one.secret for one in references(objects) if one.pulls_images}
    return tuple(sorted(named - _brought(objects)))


def _brought(objects: Sequence[Object]) -> set[str]:
    return {one["metadata"]["name"] for one in objects if one["kind"] == "Secret"}


def _change_serve_config(service: Object) -> Object:
    """Return the RayService with another Serve config that restarts no replica.

    The first deployment polls a little more slowly for its last requests when it ends.
    Raises `ConfigError` if no application names a deployment.
    """
    changed = copy.deepcopy(service)
    try:
        config = yaml.safe_load(service["spec"]["serveConfigV2"])
        deployment = next(
            one for app in config["applications"] for one in app.get("deployments") or ()
        )
    except (yaml.YAMLError, KeyError, TypeError, StopIteration):
        raise ConfigError(
            f"RayService {service['metadata']['name']}: spec.serveConfigV2 has no application with "
            "`deployments`, so nothing can be changed in place. Add at least the Generator, as "
            "configs/ does."
        ) from None
    wait_s = deployment.get("graceful_shutdown_wait_loop_s") or _WAIT_LOOP_S
    deployment["graceful_shutdown_wait_loop_s"] = wait_s + 0.5
    changed["spec"]["serveConfigV2"] = yaml.safe_dump(config, sort_keys=False)
    return changed


def _change_cluster(service: Object) -> Object:
    """Return the RayService with one more annotation on a pod template: KubeRay upgrades for it."""
    changed = copy.deepcopy(service)
    spec = changed["spec"]["rayClusterConfig"]
    group = (spec.get("workerGroupSpecs") or [spec["headGroupSpec"]])[0]
    metadata = group["template"].setdefault("metadata", {})
    metadata["annotations"] = (metadata.get("annotations") or {}) | {CHANGE: "upgrade"}
    return changed


def _serve_port(service: Object) -> int:
    """Return the port of Serve's proxies."""
    config = yaml.safe_load(service["spec"].get("serveConfigV2") or "") or {}
    return int((config.get("http_options") or {}).get("port") or 8000)
