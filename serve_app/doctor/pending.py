"""Why a pod does not run, and what to do about it."""

import re
from collections.abc import Iterator, Sequence

from serve_app.doctor.kube import Object
from serve_app.doctor.report import Finding, failed, warning

_UNSCHEDULABLE = (
    (
        r"untolerated taint",
        "Give the pod template a toleration for the taint that is named, or take the taint off the "
        "node. KubeRay leaves tolerations out when it compares: delete the RayService and apply it "
        "again.",
    ),
    (
        r"didn't match Pod's node affinity/selector",
        "No node has the labels that the pod selects on: compare its nodeSelector with `kubectl "
        "get nodes --show-labels`. Labels nvidia.com/gpu.* come from GPU feature discovery.",
    ),
    (
        r"persistentvolumeclaim \S+ not found",
        "Apply the claim: it comes with the component `model-cache`.",
    ),
    (
        r"unbound immediate PersistentVolumeClaims",
        "Look at the claim (`kubectl describe pvc`): its StorageClass does not exist, or can make "
        "no volume of this size and access mode.",
    ),
    (
        r"volume node affinity conflict",
        "The volume lies in another zone than the free nodes: use a StorageClass with "
        "volumeBindingMode: WaitForFirstConsumer, or add nodes in its zone.",
    ),
    (
        r"Insufficient nvidia\.com/",
        "All GPUs are taken, or a node has fewer than one pod asks for. Wait for the autoscaler "
        "(`kubectl describe pod` shows TriggeredScaleUp, or NotTriggerScaleUp and why), raise the "
        "node group's limit or the quota, or lower maxReplicas.",
    ),
    (
        r"Insufficient (memory|cpu|ephemeral-storage)",
        "The pod asks for more than a node has left beside what runs there: lower its requests to "
        "the node's allocatable less the daemonsets, or take a larger node.",
    ),
    (
        r"Too many pods",
        "The node is full of pods: raise its limit, or take more nodes.",
    ),
)

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
    "image": "The node cannot fetch the image: look at its name, its tag and imagePullSecrets. On "
    "a laptop, load it into the nodes: `kind load docker-image IMAGE`, or `minikube image load "
    "IMAGE`.",
    "config": "A Secret or ConfigMap that the pod names is not in the namespace: create it; "
    "`kubectl describe pod` names it.",
    "start": "The container runtime cannot start it. If NVIDIA's hook or CDI is named, the node's "
    "driver or its NVIDIA Container Toolkit is broken, or the pod needs runtimeClassName: nvidia.",
    "crash": "It ends once it starts: `kubectl logs --previous` says why; exit code 137 means "
    "that its memory limit is too low.",
}


_EVENTS = (
    (
        r'(secret|configmap) "[^"]+" not found|references non-existent (secret|config) key',
        "Create what is named, in the pod's namespace; cluster/README.md lists the Secrets and "
        "their keys. For api-keys:\n"
        "  diffusion-serve key first-app > keys.yaml\n"
        "  kubectl -n {namespace} create secret generic api-keys --from-file=keys.yaml",
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
"""What the node says of a pod that it was given."""


def _events_of(pod: Object, events: Sequence[Object]) -> list[Object]:
    """Those of the pod itself, the latest last."""
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
    """RFC 3339, so that the latest is the largest."""
    return event.get("lastTimestamp") or event.get("eventTime") or ""


def why(pod: Object, events: Sequence[Object] = ()) -> Finding | None:
    """What keeps this pod from running; None if it runs or has ended well.

    ``events``: of its namespace.
    """
    check, status = f"pod {pod['metadata']['name']}", pod.get("status") or {}
    waiting = [
        state
        for container in (
            *(status.get("initContainerStatuses") or ()),
            *(status.get("containerStatuses") or ()),
        )
        if (state := (container.get("state") or {}).get("waiting"))
    ]
    for state in waiting:
        if (kind := _WAITING.get(state.get("reason", ""))) is not None:
            message = state.get("message")
            found = state["reason"] + (f": {message}" if message else "")
            return failed(check, found, _ADVICE[kind])
    if (ended := _ended(check, pod)) is not None:
        return ended
    if status.get("phase") != "Pending":
        return None
    conditions = status.get("conditions") or []
    scheduled: Object = next((one for one in conditions if one["type"] == "PodScheduled"), {})
    if scheduled.get("status") == "False":
        return _unscheduled(check, scheduled)
    if scheduled.get("status") == "True":
        return _placed(check, pod, _events_of(pod, events))
    return warning(
        check,
        "pending: no scheduler has looked at it yet",
        "Look again; if it stays so, schedulerName names one that is not there, or a quota is used "
        "up (`kubectl get events`).",
    )


def _unscheduled(check: str, condition: Object) -> Finding:
    message = condition.get("message") or condition.get("reason") or "it is not said why"
    if condition.get("reason") == "SchedulingGated":
        return warning(
            check,
            f"pending: {message}",
            "Something holds its schedulingGates, such as a queue (Kueue): look there.",
        )
    advice = [text for pattern, text in _UNSCHEDULABLE if re.search(pattern, message)]
    return failed(
        check,
        f"pending: {message}",
        "\n".join(advice) or "`kubectl describe pod` shows its events.",
    )


def _placed(check: str, pod: Object, events: Sequence[Object]) -> Finding:
    """On a node, which has not started it: by what that node says."""
    complaints: list[str] = []
    for event in events:
        if event.get("reason") in ("Pulling", "Pulled"):  # what hindered it before is over
            complaints = []
        elif event.get("type") == "Warning" and event.get("reason") != "FailedScheduling":
            complaints.append(str(event.get("message", "")))
    for message in reversed(complaints):
        for pattern, advice in _EVENTS:
            if re.search(pattern, message):
                namespace = pod["metadata"]["namespace"]
                return failed(check, f"pending: {message}", advice.format(namespace=namespace))
    if complaints:
        return warning(
            check,
            f"pending: {complaints[-1]}",
            "The node tries again; if it stays so, `kubectl describe pod` shows all that it says.",
        )
    return warning(
        check,
        "pending: placed, and its containers are being made",
        "An image of several GiB takes minutes to come; if it takes longer, `kubectl describe "
        "pod` shows what it waits for.",
    )


def _ended(check: str, pod: Object) -> Finding | None:
    """A pod that failed, or one of its containers; KubeRay's are not started again."""
    status = pod.get("status") or {}
    if pod["metadata"].get("deletionTimestamp"):
        return None
    for container, state in _terminated(status):
        code, reason = state["exitCode"], state.get("reason") or "no reason"
        namespace = pod["metadata"]["namespace"]
        log = f"`kubectl -n {namespace} logs POD -c {container}` says why."
        if state.get("reason") == "OOMKilled" or code == _KILLED:
            log = f"Mostly its memory limit is too low: raise requests and limits. {log}"
        return failed(check, f"container {container} ended with code {code} ({reason})", log)
    if status.get("phase") != "Failed":
        return None
    said = ": ".join(status[field] for field in ("reason", "message") if status.get(field))
    return failed(
        check,
        f"failed: {said or 'it is not said why'}",
        "The node has ended it, for want of memory or disk (Evicted: the cache's emptyDir counts, "
        "too) or since it went away itself: `kubectl describe pod` and `kubectl describe node` "
        "show which.",
    )


_KILLED = 128 + 9
"""Exit code of a process that SIGKILL has ended."""


def _terminated(status: Object) -> Iterator[tuple[str, Object]]:
    """Containers that ended, and not well."""
    for field in ("initContainerStatuses", "containerStatuses"):
        for container in status.get(field) or ():
            state = (container.get("state") or {}).get("terminated")
            if state and state["exitCode"] != 0:
                yield container["name"], state


_REPLACED = re.compile(r"Deleted (?:head|worker) Pod \S+?/(\S+); Pod status: (\w+);.*")
_STATE = re.compile(r"ExitCode:(-?\d+),.*?Reason:(\w*),")


def replaced(events: Sequence[Object]) -> Finding | None:
    """Pods that had ended and that KubeRay has deleted, to make new ones in their places.

    Its events are all that is left of them, for as long as Kubernetes keeps events: an hour.
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
        f"{len(ended)} that had ended, within the last hour or so; the last: {last[1]}, {how}",
        "KubeRay starts no container again, it replaces the pod, and the log goes with it: watch "
        "the next one (`kubectl logs --follow`). Exit code 137 means mostly that the memory limit "
        "is too low; on spot nodes pods end with their node.",
    )
