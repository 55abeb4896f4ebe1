"""Checks that each required Secret exists with its keys, before any pod starts.

Each is read by its name; its values are dropped.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from serve_app.config.environment import KEYS_PATH_VARIABLE
from serve_app.doctor import placement
from serve_app.doctor.kube import ROLE, Cluster, Forbidden, NotReadable, Object, Unreachable
from serve_app.doctor.report import Finding, failed, ok, warning

_ADD = (
    "\\\n      --dry-run=client --output yaml "
    "| kubectl apply --server-side --force-conflicts --filename -"
)
"""Ending of a `kubectl create secret` that keeps the existing keys."""

_COMMANDS = {
    "api-keys": (
        "diffusion-serve key first-app > keys.yaml",
        "kubectl -n {namespace} create secret generic api-keys --from-file=keys.yaml",
    ),
    "hugging-face": (
        "kubectl -n {namespace} create secret generic hugging-face --from-literal=token=hf_…",
    ),
    "prometheus-api-key": (
        "kubectl -n {namespace} get secret api-keys "
        "--output go-template='{{{{index .data \"keys.yaml\" | base64decode}}}}' > keys.yaml",
        "diffusion-serve key prometheus >> keys.yaml  # shows the key once",
        f"kubectl -n {{namespace}} create secret generic api-keys --from-file=keys.yaml {_ADD}",
        "kubectl -n {namespace} create secret generic prometheus-api-key --from-literal=key=sk-…",
    ),
    "ray-auth-token": (
        "kubectl -n {namespace} create secret generic ray-auth-token "
        '--from-literal=auth_token="$(openssl rand -base64 32)"',
    ),
    "redis": (
        "kubectl -n {namespace} create secret generic redis "
        '--from-literal=password="$(openssl rand -hex 24)"',
    ),
    "diffusion-serve-tls": (
        "kubectl -n {namespace} create secret tls diffusion-serve-tls --cert=tls.crt --key=tls.key",
    ),
}
"""Commands by Secret. docs/operate/kubernetes.md has a table of them."""


@dataclass(frozen=True)
class Reference:
    """A Secret that an object requires."""

    secret: str
    key: str | None
    """None if any key is enough, or if the key is unknown."""
    by: str
    """The object that requires it."""
    pulls_images: bool = False
    """True for credentials of a registry, which kubelets use."""


def references(objects: Sequence[Object]) -> list[Reference]:
    """List the Secrets that objects require; those of pods through the objects that create them."""
    found: list[Reference] = []
    for one in objects:
        kind, spec = one["kind"], one.get("spec") or {}
        by = f"{kind} {one['metadata']['name']}"
        if kind == "RayService":
            found += _of_ray_service(one)
        elif kind in ("StatefulSet", "Deployment", "DaemonSet", "Job", "ReplicaSet"):
            found += _of_pod((spec.get("template") or {}).get("spec") or {}, by)
        elif kind == "Pod":
            found += _of_pod(spec, by)
        elif kind in ("PodMonitor", "ServiceMonitor"):
            for endpoint in spec.get("podMetricsEndpoints") or spec.get("endpoints") or ():
                found += _of_endpoint(endpoint, by)
        elif kind == "Gateway":
            for listener in spec.get("listeners") or ():
                for reference in (listener.get("tls") or {}).get("certificateRefs") or ():
                    if reference.get("kind", "Secret") == "Secret" and not reference.get(
                        "namespace"
                    ):
                        found += [
                            Reference(reference["name"], key, by) for key in ("tls.crt", "tls.key")
                        ]
    return list(dict.fromkeys(found))


def _of_ray_service(service: Object) -> Iterator[Reference]:
    name = service["metadata"]["name"]
    for group in placement.groups(service):
        yield from _of_pod(group.pod, f"the pods of {group.name}")
    spec = service["spec"].get("rayClusterConfig") or {}
    yield from _of_container(spec.get("autoscalerOptions") or {}, f"the autoscaler of {name}", {})
    auth = spec.get("authOptions") or {}
    if auth.get("mode") == "token" and auth.get("secretName"):
        yield Reference(auth["secretName"], "auth_token", f"authOptions of {name}")
    options = spec.get("gcsFaultToleranceOptions") or {}
    for field in ("redisUsername", "redisPassword"):
        source = ((options.get(field) or {}).get("valueFrom") or {}).get("secretKeyRef")
        yield from _of_selector(source, f"gcsFaultToleranceOptions of {name}")


def _of_pod(spec: Object, by: str) -> Iterator[Reference]:
    mounted: dict[str, str] = {}
    for volume in spec.get("volumes") or ():
        parts = (volume.get("projected") or {}).get("sources") or ()
        for source in (volume.get("secret"), *(part.get("secret") for part in parts)):
            if not source or source.get("optional"):
                continue
            secret = source.get("secretName") or source["name"]
            items = source.get("items") or ()
            for item in items:
                yield Reference(secret, item["key"], by)
            if not items:
                mounted[volume["name"]] = secret
                yield Reference(secret, None, by)
    for container in (*(spec.get("initContainers") or ()), *(spec.get("containers") or ())):
        yield from _of_container(container, by, mounted)
    for reference in spec.get("imagePullSecrets") or ():
        yield Reference(reference["name"], None, by, pulls_images=True)


def _of_container(container: Object, by: str, mounted: Mapping[str, str]) -> Iterator[Reference]:
    """List a container's references. ``mounted``: whole Secrets by volume, whose files are keys."""
    for variable in container.get("env") or ():
        yield from _of_selector((variable.get("valueFrom") or {}).get("secretKeyRef"), by)
        if variable["name"] != KEYS_PATH_VARIABLE:
            continue
        for mount in container.get("volumeMounts") or ():
            folder, _, file = str(variable.get("value", "")).rpartition("/")
            if mount["name"] in mounted and mount["mountPath"].rstrip("/") == folder:
                yield Reference(mounted[mount["name"]], file, by)
    for source in container.get("envFrom") or ():
        if (whole := source.get("secretRef")) and not whole.get("optional"):
            yield Reference(whole["name"], None, by)


def _of_endpoint(endpoint: Object, by: str) -> Iterator[Reference]:
    basic = endpoint.get("basicAuth") or {}
    for selector in (
        (endpoint.get("authorization") or {}).get("credentials"),
        endpoint.get("bearerTokenSecret"),
        basic.get("username"),
        basic.get("password"),
    ):
        yield from _of_selector(selector, by)


def _of_selector(selector: Object | None, by: str) -> Iterator[Reference]:
    if selector and selector.get("name") and not selector.get("optional"):
        yield Reference(selector["name"], selector.get("key"), by)


def check_secrets(
    cluster: Cluster, services: Sequence[Object], overlay: Sequence[Object] | None
) -> Iterator[Finding]:
    """Look up each Secret that the overlay requires, or without one the applied RayServices."""
    # api-keys first: the command for prometheus-api-key continues from its result.
    objects = services if overlay is None else overlay
    found = references(sorted(objects, key=lambda one: one["kind"] != "RayService"))
    brought = _brought_secrets(overlay or ())
    forbidden: dict[str, Forbidden] = {}
    there = []
    for name in dict.fromkeys(one.secret for one in found):
        own = [one for one in found if one.secret == name]
        keys: frozenset[str] | None
        if name in brought:
            keys = brought[name]
            if keys is None:  # a controller creates it
                there.append(name)
                continue
        else:
            try:
                keys = cluster.secret_keys(name)
            except Forbidden as error:
                forbidden[name] = error
                continue
            except Unreachable:
                raise
            except NotReadable as error:
                yield failed(f"Secret {name}", error.found, error.advice)
                continue
        wanted = sorted({one.key for one in own if one.key is not None})
        by = ", ".join(dict.fromkeys(one.by for one in own))
        missing = [key for key in wanted if key not in (keys or ())]
        if keys is None:
            what = f" with the key {' and '.join(wanted)}" if wanted else ""
            yield failed(
                f"Secret {name}",
                f"not in namespace {cluster.namespace}, and needed{what} by {by}",
                f"Create it:\n{command(name, wanted, cluster.namespace)}",
            )
        elif missing:
            has = f"it has {', '.join(sorted(keys))}" if keys else "it is empty"
            yield failed(
                f"Secret {name}",
                f"without the key {' and '.join(missing)}, which {by} need ({has})",
                f"Add it:\n{command(name, missing, cluster.namespace, add=True)}",
            )
        else:
            there.append(name)
    if there:
        yield ok("Secrets", f"{', '.join(there)}: there, with the needed keys")
    if forbidden:
        yield _not_readable(cluster.namespace, forbidden)


def command(name: str, keys: Sequence[str], namespace: str, add: bool = False) -> str:
    """Return the command that creates the Secret with ``keys``, or adds them to it."""
    commands = _COMMANDS.get(name)
    if commands is None:
        literals = "".join(f" --from-literal={key}=…" for key in keys) or " --from-file=…"
        commands = (f"kubectl -n {{namespace}} create secret generic {name}{literals}",)
    lines = [f"  {line.format(namespace=namespace)}" for line in commands]
    if add:
        lines[-1] += f" {_ADD}"
    return "\n".join(lines)


def _not_readable(namespace: str, forbidden: Mapping[str, Forbidden]) -> Finding:
    user = next(iter(forbidden.values())).user
    names = " ".join(f"--resource-name={name}" for name in forbidden)
    return warning(
        "Secrets",
        f"{', '.join(forbidden)}: may not be read",
        "Let an administrator check them, because pods stay pending without them:\n"
        f"  kubectl -n {namespace} get secret {' '.join(forbidden)}\n"
        "Or have an administrator grant it for these alone:\n"
        f"  kubectl -n {namespace} create role {ROLE} --verb=get --resource=secrets {names}\n"
        f"  kubectl -n {namespace} create rolebinding {ROLE} --role={ROLE} --user={user}",
    )


def _brought_secrets(overlay: Sequence[Object]) -> dict[str, frozenset[str] | None]:
    """Return the keys of the overlay's own Secrets, None where a controller creates them."""
    brought: dict[str, frozenset[str] | None] = {}
    for one in overlay:
        spec, name = one.get("spec") or {}, (one.get("metadata") or {}).get("name", "")
        if one["kind"] == "Secret":
            brought[name] = frozenset((*(one.get("data") or ()), *(one.get("stringData") or ())))
        elif one["kind"] == "ExternalSecret":
            brought[(spec.get("target") or {}).get("name") or name] = None
        elif one["kind"] == "SealedSecret":
            brought[name] = None
        elif one["kind"] == "Certificate":
            brought[spec.get("secretName", "")] = None
    return brought
