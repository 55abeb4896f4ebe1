"""Why a pod does not run, and what to do about it."""

import re

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
    "kind, load it into the nodes: `kind load docker-image IMAGE`.",
    "config": "A Secret or ConfigMap that the pod names is not in the namespace: create it; "
    "`kubectl describe pod` names it.",
    "start": "The container runtime cannot start it. If NVIDIA's hook or CDI is named, the node's "
    "driver or its NVIDIA Container Toolkit is broken, or the pod needs runtimeClassName: nvidia.",
    "crash": "It ends once it starts: `kubectl logs --previous` says why; exit code 137 means "
    "that its memory limit is too low.",
}


def why(pod: Object) -> Finding | None:
    """What keeps this pod from running; None if it runs or has ended."""
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
    if status.get("phase") != "Pending":
        return None
    conditions = status.get("conditions") or []
    scheduled: Object = next((one for one in conditions if one["type"] == "PodScheduled"), {})
    if scheduled.get("status") == "False":
        return _unscheduled(check, scheduled)
    if scheduled.get("status") == "True":
        return warning(
            check,
            "pending: placed, and its containers are being made",
            "An image of several GiB takes minutes to come; if it takes longer, `kubectl describe "
            "pod` shows what it waits for.",
        )
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
