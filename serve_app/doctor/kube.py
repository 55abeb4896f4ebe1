"""Reads the objects of a Kubernetes cluster as plain mappings, through the official client.

The client is an extra, and only `kube_write` imports it too. Failures become exceptions with
advice: no kubeconfig, no answer, no rights.
"""

import json
import re
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import yaml

from serve_app.errors import ConfigError

Object = dict[str, Any]
"""An object as the API returns it in JSON."""

READ = (
    "daemonsets.apps",
    "deployments.apps",
    "events",
    "gatewayclasses.gateway.networking.k8s.io",
    "gateways.gateway.networking.k8s.io",
    "nodes",
    "persistentvolumeclaims",
    "pods",
    "rayclusters.ray.io",
    "rayservices.ray.io",
    "storageclasses.storage.k8s.io",
)
"""All resources that the doctor lists. Secrets are read one by one: see `secret_keys`."""

_VERSIONS = {
    "apps": "v1",
    "gateway.networking.k8s.io": "v1",
    "ray.io": "v1",
    "storage.k8s.io": "v1",
}
ROLE = "diffusion-serve-doctor"
_TIMEOUT_S = (5.0, 30.0)
"""Limits for the connection and for the answer."""


_OF_NO_NAMESPACE = ("gatewayclasses", "nodes", "storageclasses")


class NotReadable(Exception):
    """A failed read: ``found`` is the failure, ``advice`` what to do."""

    def __init__(self, found: str, advice: str) -> None:
        super().__init__(found, advice)
        self.found = found
        self.advice = advice


class Unreachable(NotReadable):
    """A failure of the whole cluster, so that nothing else need be tried."""


class Forbidden(NotReadable):
    """A read that the rights of ``user`` do not cover."""

    def __init__(self, found: str, advice: str, user: str) -> None:
        super().__init__(found, advice)
        self.user = user


class Kind(NamedTuple):
    """One kind of object as the API server serves it."""

    plural: str
    namespaced: bool


class Cluster:
    """The cluster of the current context, or the one that this pod runs in."""

    def __init__(self, namespace: str | None = None, kubeconfig: Path | None = None) -> None:
        """Connect; ``kubeconfig`` overrides KUBECONFIG and ~/.kube/config.

        Raises:
            ConfigError: if the official client is not installed.
            Unreachable: if no cluster is configured.
        """
        try:
            from kubernetes import client, config
        except ImportError as error:
            raise ConfigError(
                f"--cluster needs the official Kubernetes client: {error}. In a clone "
                "of this repository: `pip install -c constraints.txt -e '.[cluster]'`."
            ) from None
        settings = client.Configuration()
        settings.retries = 1
        own_namespace = None
        try:
            config.load_kube_config(
                None if kubeconfig is None else str(kubeconfig), client_configuration=settings
            )
            _, context = config.list_kube_config_contexts(
                None if kubeconfig is None else str(kubeconfig)
            )
            self.name = context["name"]
            own_namespace = context["context"].get("namespace")
        except (config.ConfigException, yaml.YAMLError, OSError) as error:
            try:
                config.load_incluster_config(settings)
            except config.ConfigException:
                raise Unreachable(
                    f"no cluster is configured: {' '.join(str(error).split())}",
                    "Run `kubectl config get-contexts`, choose one with `kubectl config "
                    "use-context`, or name the file in KUBECONFIG.",
                ) from None
            self.name = "the cluster of this pod"
            own_namespace = _namespace_of_this_pod()
        self.namespace: str = namespace or own_namespace or "default"
        self.namespace_is_requested = namespace is not None
        self._client = client.ApiClient(settings)
        self.host: str = settings.host
        # Several checks read the same objects.
        self._list = cache(self._read)
        self.kinds = cache(self._discover)
        """Kinds that the API server serves in an ``apiVersion``, by name; empty if none."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def version(self) -> str:
        """Return the version of the API server. Raises `Unreachable`."""
        try:
            return str(self._get("/version", "version", "").get("gitVersion", "unknown"))
        except NotReadable as error:
            raise Unreachable(error.found, error.advice) from None

    def served(self, group: str) -> dict[str, tuple[str, ...]]:
        """Return an API group's resources by version, empty if none. Raises `NotReadable`."""
        versions = self._get(f"/apis/{group}", group, "").get("versions") or ()
        return {
            version: tuple(
                resource["name"]
                for resource in self._get(f"/apis/{group}/{version}", group, "").get(
                    "resources", ()
                )
            )
            for version in (one["version"] for one in versions)
        }

    def _discover(self, api_version: str) -> dict[str, Kind]:
        """Read the kinds of ``api_version``, which needs no rights. Raises `NotReadable`."""
        resources = self._get(base(api_version), api_version, "").get("resources") or ()
        return {
            one["kind"]: Kind(one["name"], one["namespaced"])
            for one in resources
            if "/" not in one["name"]
        }

    def secret_keys(self, name: str) -> frozenset[str] | None:
        """Return the keys of one Secret of the namespace, None if there is no such Secret.

        The values are dropped here. Raises `Forbidden` or `NotReadable`.
        """
        path = f"/api/v1/namespaces/{self.namespace}/secrets/{name}"
        secret = self._get(path, f"secrets/{name}", f" -n {self.namespace}", "get")
        return frozenset(secret.get("data") or ()) if secret else None

    def list(self, resource: str, everywhere: bool = True) -> tuple[Object, ...]:
        """List the objects of ``resource`` (see `READ`); of the namespace unless ``everywhere``.

        The result is empty where the cluster has no such resource. Raises `NotReadable`.
        """
        return self._list(resource, None if everywhere else self.namespace)

    def _read(self, resource: str, namespace: str | None) -> tuple[Object, ...]:
        kind, _, group = resource.partition(".")
        base = f"/apis/{group}/{_VERSIONS[group]}" if group else "/api/v1"
        where = "" if namespace is None else f"/namespaces/{namespace}"
        scope = " --all-namespaces" if namespace is None else f" -n {namespace}"
        if kind in _OF_NO_NAMESPACE:
            scope = ""
        answer = self._get(f"{base}{where}/{kind}", resource, scope)
        return tuple(answer.get("items") or ())

    def _get(self, path: str, resource: str, scope: str, verb: str = "list") -> Object:
        from urllib3.exceptions import HTTPError

        request = self._client.param_serialize(
            "GET",
            path,
            header_params={"Accept": "application/json"},
            auth_settings=["BearerToken"],
        )
        try:
            response = self._client.call_api(*request, _request_timeout=_TIMEOUT_S)
            body = response.read()
        except HTTPError as error:
            raise self._unreachable(error) from None
        if response.status == 404:
            return {}
        if response.status >= 400:
            raise self._rejection(response.status, body, resource, f"{verb} {resource}{scope}")
        content: Object = json.loads(body)
        return content

    def _unreachable(self, error: Exception) -> Unreachable:
        from urllib3.exceptions import SSLError

        reason = getattr(error, "reason", None) or error
        if isinstance(reason, SSLError):
            advice = (
                "The API server shows another certificate than the kubeconfig expects, or this "
                "one shows none: get a new kubeconfig from the cluster's administrator."
            )
        else:
            advice = (
                "Check that `kubectl version` answers from here: the context may name a "
                "cluster that is gone, or need a VPN or a proxy."
            )
        return Unreachable(f"{self.host} ({self.name}) cannot be reached: {reason}", advice)

    def _rejection(self, status: int, body: bytes, resource: str, question: str) -> NotReadable:
        message, user = read_error(body)
        if status == 401:
            return Unreachable(
                f"{self.host} ({self.name}) rejects the credentials: {message}",
                "The credentials of the kubeconfig have run out: log in again, and check that "
                "`kubectl auth whoami` answers.",
            )
        if status == 403:
            return Forbidden(
                f"may not be read: `kubectl auth can-i {question}` answers no",
                "Have an administrator grant it:\n"
                f"  kubectl create clusterrole {ROLE} --verb=list "
                f"--resource={','.join(self._known(resource))}\n"
                f"  kubectl create clusterrolebinding {ROLE} --clusterrole={ROLE} --user={user}",
                user,
            )
        return NotReadable(
            f"the API server answers {status}: {message}",
            f"Try `kubectl get {question.partition(' ')[2]}`; if that fails too, the fault is the "
            "API server's.",
        )

    def _known(self, requested: str) -> tuple[str, ...]:
        """Return the part of `READ` that the cluster has: kubectl rejects a role for others."""
        known = []
        for resource in READ:
            group = resource.partition(".")[2]
            try:
                if (
                    group
                    and not self.kinds(f"{group}/{_VERSIONS[group]}")
                    and resource != requested
                ):
                    continue
            except NotReadable:
                pass  # one too many is better than one too few
            known.append(resource)
        return tuple(known)


def _namespace_of_this_pod() -> str | None:
    file = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
    return file.read_text().strip() if file.is_file() else None


def base(api_version: str, namespace: str | None = None) -> str:
    """Return the path of an API version, or of a namespace in it."""
    root = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
    return root if namespace is None else f"{root}/namespaces/{namespace}"


def read_error(body: bytes) -> tuple[str, str]:
    """Return the message of an error of the API server, and the user that it names or "USER"."""
    try:
        message = str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        message = body[:200].decode(errors="replace")
    user = re.search(r'User "([^"]+)"', message)
    return message, user[1] if user else "USER"


def full_name(item: Object) -> str:
    """Return namespace and name."""
    return f"{item['metadata']['namespace']}/{item['metadata']['name']}"


def images(workload: Object) -> list[str]:
    """Return the images of a deployment's or daemonset's containers."""
    containers = workload["spec"]["template"]["spec"]["containers"]
    return [str(container.get("image", "")) for container in containers]


def amount_of(quantity: str | int | float) -> Decimal:
    """Parse an amount of a resource, as `500m` or `32Gi`. Raises `ConfigError`."""
    from kubernetes.utils.quantity import parse_quantity

    try:
        amount: Decimal = parse_quantity(quantity)
    except ValueError:
        raise ConfigError(
            f"{quantity!r} is not an amount of a resource; Kubernetes writes 500m, 2 or 32Gi."
        ) from None
    return amount
