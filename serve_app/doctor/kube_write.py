"""Changes the objects of a Kubernetes cluster, for the rehearsal alone.

Every read is fresh, and every write is a server-side apply with strict field validation: the API
server names a misspelt field instead of dropping it.
"""

import json
from typing import Any

from serve_app.doctor.kube import Cluster, Kind, NotReadable, Object, base, read_error

FIELD_MANAGER = "diffusion-serve-rehearsal"
"""Owner of the applied fields, as `kubectl get --show-managed-fields` shows it."""

_TIMEOUT_S = (5.0, 30.0)
"""Limits for the connection and for the answer."""


class Refused(NotReadable):
    """A request that the API server answers with an error; ``status`` is HTTP's."""

    def __init__(self, status: int, found: str, advice: str) -> None:
        super().__init__(found, advice)
        self.status = status


class WritableCluster(Cluster):
    """A cluster whose objects can be created, applied and deleted, and are read anew each time."""

    def kind(self, api_version: str, kind: str) -> Kind | None:
        """Return the resource behind a kind; None if the API server does not serve it.

        Raises:
            NotReadable: if the API server does not answer.
        """
        return self.kinds(api_version).get(kind)

    def lives_in_namespace(self, one: Object) -> bool | None:
        """Return whether the kind of an object has namespaces; None if it is not served."""
        kind = self.kind(one["apiVersion"], one["kind"])
        return None if kind is None else kind.namespaced

    def get(self, path: str, **query: str) -> Object | None:
        """Read the object or list at ``path``; None if there is none. Raises `NotReadable`."""
        status, body = self.send("GET", path, query=query)
        if status == 404:
            return None
        return self._object("get", path, status, body)

    def items(self, path: str, **query: str) -> list[Object]:
        """List the objects below ``path``; none where the resource is not served."""
        return list((self.get(path, **query) or {}).get("items") or ())

    def create(self, path: str, body: Object) -> Object:
        """Create an object that must not be there yet. Raises `NotReadable`."""
        status, answer = self.send("POST", path, body)
        return self._object("create", path, status, answer)

    def apply(self, body: Object, dry_run: bool = False) -> Object:
        """Apply an object of a namespace; with ``dry_run`` it is checked and nothing is stored.

        Raises:
            NotReadable: if its kind is not served, or with the API server's own message.
        """
        api_version, name = body["apiVersion"], body["metadata"]["name"]
        if (kind := self.kind(api_version, body["kind"])) is None:
            raise Refused(
                404,
                f"the API server serves no {body['kind']} of {api_version}",
                "Install what brings this kind's CRD, or leave the component out of the overlay.",
            )
        path = f"{base(api_version, body['metadata']['namespace'])}/{kind.plural}/{name}"
        query = {"fieldManager": FIELD_MANAGER, "force": "true", "fieldValidation": "Strict"}
        if dry_run:
            query["dryRun"] = "All"
        status, answer = self.send("PATCH", path, body, "application/apply-patch+yaml", query)
        return self._object("apply", path, status, answer)

    def delete(self, path: str, uid: str | None = None, grace_s: int | None = None) -> None:
        """Delete an object if it is there. ``uid``: only the one that has it. Raises `NotReadable`.

        ``grace_s`` 0 removes a pod without its node's confirmation.
        """
        options: Object = {"apiVersion": "v1", "kind": "DeleteOptions"}
        options["propagationPolicy"] = "Background"
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        if grace_s is not None:
            options["gracePeriodSeconds"] = grace_s
        status, answer = self.send("DELETE", path, options)
        if status != 404:
            self._object("delete", path, status, answer)

    def send(
        self,
        method: str,
        path: str,
        body: Object | None = None,
        content_type: str = "application/json",
        query: dict[str, str] | None = None,
        timeout_s: float = _TIMEOUT_S[1],
    ) -> tuple[int, bytes]:
        """Send one request; return the answer's status and body. Raises `Unreachable`."""
        from urllib3.exceptions import HTTPError

        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = content_type
        # JSON is YAML, so that one body serves both content types.
        data = body if body is None or content_type == "application/json" else json.dumps(body)
        request = self._client.param_serialize(
            method,
            path,
            header_params=headers,
            query_params=list((query or {}).items()),
            body=data,
            auth_settings=["BearerToken"],
        )
        try:
            response = self._client.call_api(*request, _request_timeout=(_TIMEOUT_S[0], timeout_s))
            return int(response.status), bytes(response.read())
        except HTTPError as error:
            raise self._unreachable(error) from None

    def forward(self, namespace: str, pod: str, port: int) -> Any:
        """Open the official client's port forward, with `socket`, `error` and `close`.

        Raises:
            Refused: if the API server does not open it.
        """
        from kubernetes import client
        from kubernetes.client.exceptions import ApiException
        from kubernetes.stream import portforward

        call = client.CoreV1Api(self._client).connect_get_namespaced_pod_portforward
        try:
            return portforward(call, pod, namespace, ports=str(port))
        except ApiException as error:
            reason = str(error.reason).partition(" -+-+- ")[0]  # headers and body follow
            raise Refused(
                error.status or 0,
                f"no port forward to pod {pod}: {reason}",
                "Try `kubectl port-forward`: it uses the same route and the same right.",
            ) from None

    def _object(self, verb: str, path: str, status: int, body: bytes) -> Object:
        if status < 400:
            content: Object = json.loads(body)
            return content
        message, user = read_error(body)
        what = path.partition("/v1/")[2] or path
        if status in (401, 403):
            raise Refused(
                status,
                f"may not {verb} {what}: {message}",
                "The rehearsal creates a namespace and what the overlay holds, and deletes them. "
                "Use a kubeconfig with these rights; an administrator can grant them meanwhile:\n"
                "  kubectl create clusterrolebinding diffusion-serve-rehearsal "
                f"--clusterrole=cluster-admin --user={user}",
            )
        raise Refused(
            status,
            f"{verb} {what}: the API server answers {status}: {message}",
            "Correct what the message names in the overlay."
            if status in (400, 422)
            else "If `kubectl` gets the same answer, check what the message names: a quota, an "
            "admission webhook, or the API server itself.",
        )
