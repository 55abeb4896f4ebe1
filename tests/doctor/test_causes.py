"""Made-up clusters with one cause each: the first advice names the cause.

`pytest -s tests/doctor/test_causes.py` prints each: cluster, what is found first, its advice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from serve_app.doctor.cluster import look
from serve_app.doctor.kube import Cluster
from serve_app.doctor.report import table
from tests.doctor.fake_cluster import (
    TOLERATION,
    FakeApi,
    Object,
    node,
    on,
    operator,
    plugin,
    secret,
    service,
    unscheduled,
    waiting,
)
from tests.doctor.fake_gateways import GATEWAYS, condition, gateway, gateway_class, incremental

_GPU = {"nvidia.com/gpu": "1"}
_PRODUCT = "nvidia.com/gpu.product"
_H100 = {_PRODUCT: "NVIDIA-H100-80GB-HBM3"}
_SPOT = {"key": "cloud.google.com/gke-spot", "value": "true", "effect": "NoSchedule"}
_ACCEPTED = condition("Accepted", "True", "Accepted")


@dataclass(frozen=True)
class Case:
    """One cause."""

    cluster: str
    make: Callable[[FakeApi], list[Object] | None]
    """Changes a cluster in which nothing is wrong; returns the overlay to compare, if any."""
    check: str
    found: str
    advice: str
    never: tuple[str, ...] = ()
    """Text that no advice of the report may contain."""

    def __str__(self) -> str:
        return self.cluster


def _worker(product: str = "NVIDIA-L4", tolerations: bool = True, **requests: str) -> Object:
    return {
        "nodeSelector": {_PRODUCT: product},
        "tolerations": [TOLERATION] if tolerations else [],
        "containers": [{"name": "w", "resources": {"limits": _GPU | requests}}],
    }


def _not_ready(api: FakeApi, reason: str, message: str = "", **status: Object) -> Object:
    one = service({"conditions": [condition("Ready", "False", reason, message)]} | status)
    api.put("rayservices.ray.io", one)
    return one


def _spot(name: str) -> Object:
    tainted = node(name, gpus=1, **_H100)
    tainted["spec"]["taints"] = [*tainted["spec"]["taints"], _SPOT]
    return tainted


def _upgrade_without_a_free_gpu(api: FakeApi) -> None:
    worker = _worker(_H100[_PRODUCT])
    running = {
        "activeServiceStatus": {"rayClusterName": "sdxl-1"},
        "pendingServiceStatus": {"rayClusterName": "sdxl-2"},
        "conditions": [condition("Ready", "True", "NonZeroServeEndpoints")],
    }
    api.put("rayservices.ray.io", service(running, pod=worker))
    api.put(
        "nodes",
        node("cpu-1"),
        node("h100-1", gpus=1, **_H100),
        node("h100-2", gpus=1, **_H100),
        _spot("spot-1"),
        _spot("spot-2"),
    )
    message = (
        "0/5 nodes are available: 1 node(s) didn't match Pod's node affinity/selector, 2 "
        "Insufficient nvidia.com/gpu, 2 node(s) had untolerated taint {cloud.google.com/gke-spot: "
        "true}. preemption: 0/5 nodes are available."
    )
    api.put(
        "pods",
        on("h100-1", "sdxl-1-worker-a", **_GPU),
        on("h100-2", "sdxl-1-worker-b", **_GPU),
        unscheduled("sdxl-2-worker-a", message, ray_cluster="sdxl-2", **worker),
    )


def _only_a_taint(api: FakeApi) -> None:
    _not_ready(api, "Initializing")
    worker = _worker(tolerations=False)
    api.put("rayservices.ray.io", service({}, pod=worker))
    message = (
        "0/2 nodes are available: 1 Insufficient nvidia.com/gpu, 1 node(s) had untolerated taint "
        "{nvidia.com/gpu: present}."
    )
    api.put("pods", unscheduled("sdxl-1-worker-a", message, ray_cluster="sdxl-1", **worker))


def _another_gpu(api: FakeApi) -> None:
    api.put("nodes", node("cpu-1"), node("h100-1", gpus=1, **_H100))
    _not_ready(api, "Initializing")
    api.put("pods", unscheduled("w", "2 node(s) didn't match Pod's node affinity.", **_worker()))


def _cordoned(api: FakeApi) -> None:
    cordoned = node("gpu-1", gpus=1)
    cordoned["spec"]["unschedulable"] = True
    cordoned["spec"]["taints"] = [
        *cordoned["spec"]["taints"],
        {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"},
    ]
    api.put("nodes", node("cpu-1"), cordoned)
    _not_ready(api, "Initializing")
    api.put("pods", unscheduled("w", "1 node(s) were unschedulable.", **_worker()))


def _memory(api: FakeApi) -> None:
    worker = _worker(memory="20Gi")
    _not_ready(api, "Initializing")
    message = (
        "0/2 nodes are available: 1 Insufficient memory, 1 Insufficient nvidia.com/gpu, 1 node(s) "
        "didn't match Pod's node affinity/selector."
    )
    api.put(
        "pods",
        on("gpu-1", "vector-db", namespace="search", memory="24Gi"),
        on("gpu-1", "logs", namespace="system", memory="1Gi"),
        unscheduled("w", message, **worker),
    )


def _no_plugin(api: FakeApi) -> None:
    api.put("daemonsets.apps")
    bare = node("gpu-1")
    bare["metadata"]["labels"][_PRODUCT] = "NVIDIA-L4"
    api.put("nodes", node("cpu-1"), bare)
    _not_ready(api, "Initializing")
    api.put("pods", unscheduled("w", "2 Insufficient nvidia.com/gpu.", **_worker()))


def _keys() -> Object:
    mount = {"name": "keys", "mountPath": "/etc/diffusion-serve"}
    path = {"name": "DIFFUSION_SERVE_KEYS_PATH", "value": "/etc/diffusion-serve/keys.yaml"}
    container = {
        "name": "w",
        "env": [path],
        "volumeMounts": [mount],
        "resources": {"limits": _GPU},
    }
    keys = [{"name": "keys", "secret": {"secretName": "api-keys"}}]
    return _worker() | {"containers": [container], "volumes": keys}


def _no_keys(api: FakeApi) -> list[Object]:
    api.put("rayservices.ray.io")
    api.put("pods")
    return [service({}, pod=_keys())]


def _no_gateway_api(api: FakeApi) -> list[Object]:
    api.put("rayservices.ray.io")
    api.put("pods")
    return [incremental(service({}))]


def _no_gateway_api_live(api: FakeApi) -> None:
    api.put("rayservices.ray.io", incremental(service({})))
    api.put("pods")


def _not_programmed(api: FakeApi) -> None:
    api.kinds |= GATEWAYS
    api.put("rayservices.ray.io", incremental(service()))
    api.put("gatewayclasses.gateway.networking.k8s.io", gateway_class("eg-internal", _ACCEPTED))
    reason = condition(
        "Programmed", "False", "AddressNotAssigned", "No addresses have been assigned"
    )
    api.put("gateways.gateway.networking.k8s.io", gateway("sdxl-gateway", _ACCEPTED, reason))


def _timed_out(api: FakeApi) -> None:
    message = "RayService failed to become ready within the configured timeout of 6h0m0s."
    timed_out = _not_ready(api, "InitializingTimeout", message)
    timed_out["metadata"]["annotations"] = {"ray.io/initializing-timeout": "6h"}
    api.put("pods")


def _no_image(api: FakeApi) -> None:
    _not_ready(api, "Initializing")
    api.put("pods", waiting("w", "ImagePullBackOff", 'Back-off pulling image "app": not found'))


def _refused(api: FakeApi) -> None:
    message = (
        "The RayService spec is invalid: worker group gpu: idleTimeoutSeconds is accepted with "
        "autoscaler v2 only"
    )
    _not_ready(api, "ValidationFailed", message)
    api.put("pods")


def _no_operator(api: FakeApi) -> None:
    api.put("deployments.apps", operator(available=0))
    api.put("rayservices.ray.io", service({}))
    api.put("pods")


def _broken_plugin(api: FakeApi) -> None:
    api.put("daemonsets.apps", plugin(wanted=1, ready=0))
    sick = node("gpu-1", capacity=1, **{_PRODUCT: "NVIDIA-L4"})
    api.put("nodes", node("cpu-1"), sick)
    _not_ready(api, "Initializing")
    api.put("pods", unscheduled("w", "2 Insufficient nvidia.com/gpu.", **_worker()))


CASES = [
    Case(
        "an upgrade, no H100 free, spot nodes around",
        _upgrade_without_a_free_gpu,
        "pod sdxl-2-worker-a",
        "2 nodes fit (h100-1, h100-2), each lacks 1 nvidia.com/gpu: taken by pods "
        "sdxl-1-worker-a, sdxl-1-worker-b",
        "The second cluster of an upgrade needs spare GPUs until it has taken over",
        never=("toleration", "delete"),
    ),
    Case(
        "a taint that is not tolerated, and nothing else",
        _only_a_taint,
        "sdxl gpu",
        "it does not tolerate nvidia.com/gpu=present:NoSchedule (gpu-1)",
        "Add to the pod template:\n  tolerations:\n"
        "  - {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}",
    ),
    Case(
        "H100 nodes, and pods that select L4",
        _another_gpu,
        "sdxl gpu",
        "no node has nvidia.com/gpu.product=NVIDIA-L4",
        "Nodes here have NVIDIA-H100-80GB-HBM3: use the component for that GPU",
        never=("tolerations:", "delete"),
    ),
    Case(
        "the only GPU node is cordoned",
        _cordoned,
        "sdxl gpu",
        "1 node fits (gpu-1), but is cordoned",
        "The node is cordoned, by a person or by an upgrade. When that is finished:\n"
        "  kubectl uncordon gpu-1",
        never=("toleration", "delete"),
    ),
    Case(
        "too little memory left on the node that fits",
        _memory,
        "pod w",
        "1 node fits (gpu-1), lacks 13.0 GiB memory: taken by pods search/vector-db, system/logs",
        "The nodes that fit have too little memory left beside what runs there.",
        never=("GPU", "nodeSelector", "delete"),
    ),
    Case(
        "no device plugin",
        _no_plugin,
        "device plugin",
        "no daemonset of it: no node can offer nvidia.com/gpu",
        "Install it from cluster/platform",
        never=("toleration:", "delete"),
    ),
    Case(
        "the Secret api-keys is missing, before it is applied",
        _no_keys,
        "Secret api-keys",
        "not in namespace images, and needed with the key keys.yaml by the pods of sdxl gpu",
        "Create it:\n  diffusion-serve key first-app > keys.yaml\n"
        "  kubectl -n images create secret generic api-keys --from-file=keys.yaml",
    ),
    Case(
        "no Gateway API, before an incremental RayService is applied",
        _no_gateway_api,
        "kinds of components/incremental-upgrade",
        "does not serve Gateway (gateway.networking.k8s.io/v1), HTTPRoute",
        "Without the Gateway API, KubeRay gives an incremental RayService neither status nor "
        "events. Install Envoy Gateway",
    ),
    Case(
        "no Gateway API, and an incremental RayService without status",
        _no_gateway_api_live,
        "kinds of components/incremental-upgrade",
        "needed for Gateway sdxl-gateway (by KubeRay), HTTPRoute sdxl-httproute (by KubeRay)",
        "Without the Gateway API, KubeRay gives an incremental RayService neither status nor "
        "events. Install Envoy Gateway",
        never=("delete",),
    ),
    Case(
        "Ready, and the Gateway is not programmed",
        _not_programmed,
        "Gateway sdxl-gateway",
        "not programmed: AddressNotAssigned: No addresses have been assigned",
        "Its Service of type LoadBalancer has no address",
        never=("delete",),
    ),
    Case(
        "not ready within ray.io/initializing-timeout",
        _timed_out,
        "RayService sdxl",
        "InitializingTimeout: RayService failed to become ready within",
        "It was not ready within ray.io/initializing-timeout (6h), and has failed for good",
    ),
    Case(
        "an image that cannot be pulled",
        _no_image,
        "pod w",
        'ImagePullBackOff: Back-off pulling image "app": not found',
        "The node cannot fetch the image",
        never=("delete",),
    ),
    Case(
        "the operator refuses the RayService",
        _refused,
        "RayService sdxl",
        "rejected by the operator: The RayService spec is invalid",
        "Correct the named field and apply it again",
        never=("delete",),
    ),
    Case(
        "the operator does not run",
        _no_operator,
        "KubeRay operator",
        "not available",
        "No RayService is handled until it runs",
        never=("delete",),
    ),
    Case(
        "a device plugin that finds no driver",
        _broken_plugin,
        "device plugin",
        "ready on 0 of 1 nodes",
        "Look at its pods",
        never=("delete",),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_first_advice_names_the_cause(api: FakeApi, kubeconfig: Path, case: Case) -> None:
    overlay = case.make(api)
    with Cluster(None, kubeconfig) as cluster:
        findings = list(look(cluster, cpu=False, overlay=overlay))
    first = next(finding for finding in findings if finding.outcome == "failed")
    advice = first.advice.splitlines()
    shown = " ".join(advice if advice[0].endswith(":") else advice[:1])
    print(f"\ncluster: {case.cluster}\n  found:  {first.check}: {first.found}")
    print(f"  advice: {shown}")
    assert first.check == case.check
    assert case.found in first.found
    assert first.advice.startswith(case.advice)
    # The advice below the table comes in this order, too.
    advices = table(findings).split("\n\n")[1:]
    assert advices[0].startswith(case.check)
    for word in case.never:
        assert not any(word in finding.advice for finding in findings), (word, findings)


def test_nothing_is_wrong_where_the_secret_is_there(api: FakeApi, kubeconfig: Path) -> None:
    overlay = _no_keys(api)
    api.put("secrets", secret("api-keys", "keys.yaml"))
    with Cluster(None, kubeconfig) as cluster:
        assert {one.outcome for one in look(cluster, cpu=False, overlay=overlay)} == {"ok"}
