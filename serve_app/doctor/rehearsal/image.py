"""Requests one image from a pod's port, through the API server.

A port forward keeps the Authorization header. The API server's proxy removes it, and is the second
route where no key is needed.
"""

import base64
import binascii
import http.client
import io
import json

from serve_app.doctor.kube import NotReadable, base
from serve_app.doctor.kube_write import WritableCluster

BODY = {"prompt": "a rehearsal", "n": 1, "seed": 7}
PATH = "/v1/images/generations"

TIMEOUT_S = 330.0
"""Limit above the default time that a request waits in a gateway, 300 s."""


class CannotReach(Exception):
    """A pod's port that did not answer, with the API server's message."""


class NoImage(Exception):
    """An answer of the application that is not an image."""


def request(cluster: WritableCluster, namespace: str, pod: str, port: int, key: str | None) -> str:
    """Request an image from ``pod``; return its kind and size, such as `PNG, 64x64`.

    Raises:
        CannotReach: if nothing answers at the port.
        NoImage: if the answer is not an image.
    """
    try:
        status, body = _by_port_forward(cluster, namespace, pod, port, key)
    except CannotReach as error:
        if key is not None:
            raise
        status, body = _by_proxy(cluster, namespace, pod, port, str(error))
    return _describe(status, body)


def _by_port_forward(
    cluster: WritableCluster, namespace: str, pod: str, port: int, key: str | None
) -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json", "Connection": "close"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    forward = None
    try:
        forward = cluster.forward(namespace, pod, port)
        connection.sock = forward.socket(port)
        connection.sock.settimeout(TIMEOUT_S)
        connection.request("POST", PATH, json.dumps(BODY), headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (NotReadable, OSError, http.client.HTTPException) as error:
        details = forward.error(port) if forward is not None else None
        reason = details or (error.found if isinstance(error, NotReadable) else error)
        raise CannotReach(f"port {port} of pod {pod} cannot be reached: {reason}") from None
    finally:
        connection.close()
        if forward is not None:
            forward.close()


def _by_proxy(
    cluster: WritableCluster, namespace: str, pod: str, port: int, before: str
) -> tuple[int, bytes]:
    path = f"{base('v1', namespace)}/pods/{pod}:{port}/proxy{PATH}"
    status, body = cluster.send("POST", path, dict(BODY), timeout_s=TIMEOUT_S)
    try:
        is_ours = json.loads(body).get("kind") != "Status"
    except (ValueError, AttributeError):
        is_ours = False
    if not is_ours:
        details = body[:200].decode(errors="replace")
        raise CannotReach(f"{before}; by the API server's proxy: {status} {details}")
    return status, body


def _describe(status: int, body: bytes) -> str:
    from PIL import Image, UnidentifiedImageError

    details = body[:300].decode(errors="replace")
    if status != 200:
        raise NoImage(f"answered {status}: {details}")
    try:
        data = base64.b64decode(json.loads(body)["data"][0]["b64_json"], validate=True)
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return f"{image.format}, {image.width}x{image.height}"
    except (ValueError, KeyError, IndexError, TypeError, binascii.Error, UnidentifiedImageError):
        raise NoImage(f"answered 200, but with no image: {details}") from None
    except OSError as error:
        raise NoImage(f"answered 200 with a broken image: {error}") from None
