"""Explains why a pod does not run, with advice."""

import re
from collections.abc import Iterator, Sequence

from serve_app.doctor import secrets, unscheduled
from serve_app.doctor.kube import Object
from serve_app.doctor.report import Finding, failed, warning
from serve_app.doctor.unscheduled import Surroundings

_WAITING = {
    "ErrImagePull": "image",
    "ImagePullBackOff": "image",
    "InvalidImageName": "image",
    "ErrImageNeverPull": "image",
    "CreateContainerConfigError": "config",
    "CreateContainerError": "start",
    "RunContainerError": "start",
    "CrashLoopBackOff": "crash",
}

_ADVICE = {
    "image": "The node cannot fetch the image: check its name, its tag and imagePullSecrets. On "
    "a laptop, load it into the nodes: `kind load docker-image IMAGE`, or `minikube image load "
    "IMAGE`.",
    "config": "A Secret or ConfigMap that the pod names is not in the namespace, or is without the "
    "key: create it; `kubectl describe pod` names it.",
    "start": "The container runtime cannot start it. If NVIDIA's hook or CDI is named, the node's "
    "driver or its NVIDIA Container Toolkit is broken, or the pod needs runtimeClassName: nvidia.",
    "crash": "The container ends right after its start: `kubectl logs --previous` shows the "
    "reason.",
}


_EVENTS = (
    (
        r'(secret|configmap) "[^"]+" not found|references non-existent (secret|config) key',
        "Create what is named, in the pod's namespace; docs/operate/kubernetes.md lists the "
        "Secrets and their keys.",
    ),
    (
        r"no runtime for \S+ is configured",
        "The pod names a RuntimeClass whose runtime the node's containerd does not have: `sudo "
        "nvidia-ctk runtime configure --runtime=containerd` there, restart containerd, or leave "
        "runtimeClassName out.",
    ),
    (
        r"Multi-Attach error",
        "Another node still has the volume: the pod there must end first, or the claim needs the "
        "access mode ReadWriteMany.",
    ),
)
"""Advice by pattern of the node's events on a pod that it was assigned."""


def is_unscheduled(pod: Object) -> bool:
    """Return whether the scheduler has found no node for it."""
    status = pod.get("status") or {}
    return status.get("phase") == "Pending" and any(
        one["type"] == "PodScheduled" and one["status"] == "False"
        for one in status.get("conditions") or ()
    )


def _events_of(pod: Object, events: Sequence[Object]) -> list[Object]:
    """Return the events of the pod itself, the latest last."""
    name = pod["metadata"]["name"]
    return sorted(
        (
            one
            for one in events
            if (one["involvedObject"].get("kind"), one["involvedObject"].get("name"))
            == ("Pod", name)
        ),
        key=_when,
    )


def _when(event: Object) -> str:
    """Return the event's time in RFC 3339, so that the latest is the largest."""
    return event.get("lastTimestamp") or event.get("eventTime") or ""


def why(
    pod: Object, events: Sequence[Object] = (), around: Surroundings | None = None
) -> Finding | None:
    """Return the cause that keeps this pod from running; None if it runs or succeeded.

    ``events``: those of its namespace; ``around``: the nodes to compare an unscheduled pod with.
    """
    check, status = f"pod {pod['metadata']['name']}", pod.get("status") or {}
    for container in (
        *(status.get("initContainerStatuses") or ()),
        *(status.get("containerStatuses") or ()),
    ):
        state = (container.get("state") or {}).get("waiting") or {}
        if (kind := _WAITING.get(state.get("reason", ""))) is not None:
            return _waiting(check, pod, container, state, kind)
    if (ended := _ended(check, pod)) is not None:
        return ended
    if status.get("phase") != "Pending":
        return None
    conditions = status.get("conditions") or []
    scheduled: Object = next((one for one in conditions if one["type"] == "PodScheduled"), {})
    if scheduled.get("status") == "False":
        return unscheduled.why(check, pod, scheduled, _events_of(pod, events), around)
    if scheduled.get("status") == "True":
        return _placed(check, pod, _events_of(pod, events))
    return warning(
        check,
        "pending: no scheduler has handled it yet",
        "Run the doctor again; if it stays so, schedulerName names one that is not there, or a "
        "quota is used up (`kubectl get events`).",
    )


def _waiting(check: str, pod: Object, container: Object, state: Object, kind: str) -> Finding:
    """Explain a container that the node has not started, or restarts again and again."""
    message = state.get("message") or ""
    found, advice = state["reason"] + (f": {message}" if message else ""), _ADVICE[kind]
    if kind == "config":
        advice = _on_secret(pod, message) or advice
    last = (container.get("lastState") or {}).get("terminated")
    if kind == "crash" and last:
        code, reason = last["exitCode"], last.get("reason") or "no reason"
        found += f"; container {container['name']} ended with code {code} ({reason})"
        if last.get("reason") == "OOMKilled" or code == _KILLED:
            advice = f"{_MEMORY} {advice}"
    return failed(check, found, advice)


_SECRET = re.compile(r'secret "([^"]+)" not found|couldn\'t find key (\S+) in Secret \S+?/(\S+)')


def _on_secret(pod: Object, message: str) -> str | None:
    """Return the command that creates the Secret of the message, None if it names none."""
    if (match := _SECRET.search(message)) is None:
        return None
    namespace = pod["metadata"]["namespace"]
    if match[1]:
        return f"Create it:\n{secrets.command(match[1], (), namespace)}"
    return f"Add it:\n{secrets.command(match[3], [match[2]], namespace, add=True)}"


def _placed(check: str, pod: Object, events: Sequence[Object]) -> Finding:
    """Explain a pod that its node has not started, by the node's events."""
    complaints: list[str] = []
    for event in events:
        if event.get("reason") in ("Pulling", "Pulled"):  # the earlier obstacles are over
            complaints = []
        elif event.get("type") == "Warning" and event.get("reason") != "FailedScheduling":
            complaints.append(str(event.get("message", "")))
    for message in reversed(complaints):
        for pattern, advice in _EVENTS:
            if re.search(pattern, message):
                return failed(check, f"pending: {message}", _on_secret(pod, message) or advice)
    if complaints:
        return warning(
            check,
            f"pending: {complaints[-1]}",
            "The node tries again; if it stays so, `kubectl describe pod` shows all its events.",
        )
    return warning(
        check,
        "pending: on a node, its containers are being created",
        "An image of several GiB takes minutes to pull; if it takes longer, `kubectl describe "
        "pod` shows what it waits for.",
    )


def _ended(check: str, pod: Object) -> Finding | None:
    """Explain a failed pod or container; KubeRay's containers are not restarted."""
    status = pod.get("status") or {}
    if pod["metadata"].get("deletionTimestamp"):
        return None
    for container, state in _terminated(status):
        code, reason = state["exitCode"], state.get("reason") or "no reason"
        namespace = pod["metadata"]["namespace"]
        log = f"`kubectl -n {namespace} logs POD -c {container}` shows the reason."
        if state.get("reason") == "OOMKilled" or code == _KILLED:
            log = f"{_MEMORY} {log}"
        return failed(check, f"container {container} ended with code {code} ({reason})", log)
    if status.get("phase") != "Failed":
        return None
    reason = ": ".join(status[field] for field in ("reason", "message") if status.get(field))
    return failed(
        check,
        f"failed: {reason or 'no reason given'}",
        "The node ended it, for lack of memory or disk, or because the node itself went away. "
        "For `Evicted`, the cache's emptyDir counts, too. `kubectl describe pod` and `kubectl "
        "describe node` show the reason.",
    )


_KILLED = 128 + 9
"""Exit code of a process that was ended by SIGKILL."""

_MEMORY = "Usually its memory limit is too low: raise requests and limits."


def _terminated(status: Object) -> Iterator[tuple[str, Object]]:
    """Yield the containers that ended with an error."""
    for field in ("initContainerStatuses", "containerStatuses"):
        for container in status.get(field) or ():
            state = (container.get("state") or {}).get("terminated")
            if state and state["exitCode"] != 0:
                yield container["name"], state


_REPLACED = re.compile(r"Deleted (?:head|worker) Pod \S+?/(\S+); Pod status: (\w+);.*")
_STATE = re.compile(r"ExitCode:(-?\d+),.*?Reason:(\w*),")


def replaced(events: Sequence[Object]) -> Finding | None:
    """Report ended pods that KubeRay has deleted and replaced.

    Only its events remain of them, for as long as Kubernetes keeps events: an hour.
    """
    ended = sorted(
        (
            one
            for one in events
            if one["involvedObject"].get("kind") == "RayCluster"
            and _REPLACED.match(one.get("message") or "")
        ),
        key=_when,
    )
    if not ended:
        return None
    message = ended[-1]["message"]
    last = _REPLACED.match(message)
    state = _STATE.search(message)
    assert last is not None
    how = f"{last[2]}, exit code {state[1]} ({state[2] or 'no reason'})" if state else last[2]
    return warning(
        "replaced pods",
        f"{len(ended)} that ended within about the last hour; the last: {last[1]}, {how}",
        "KubeRay restarts no container; it replaces the pod, and the log is lost with it: watch "
        "the next one (`kubectl logs --follow`). Exit code 137 usually means that the memory limit "
        "is too low; on spot nodes pods end with their node.",
    )
