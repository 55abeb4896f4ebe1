"""Checks of a cluster's GPU nodes: the device plugin, and the GPUs that nodes offer."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from serve_app.doctor import placement, places, shortage
from serve_app.doctor.kube import Cluster, Object, full_name, images
from serve_app.doctor.report import Finding, failed, ok, warning

_DEVICE_PLUGIN = re.compile(r"nvidia.*device-plugin")
_NOT_THE_PLUGIN = re.compile(r"feature-discovery|mps-control-daemon")
"""Daemonsets of the same chart, with the same image."""


def check_device_plugin(cluster: Cluster) -> Iterator[Finding]:
    check = "device plugin"
    plugins = [
        one
        for one in cluster.list("daemonsets.apps")
        if not _NOT_THE_PLUGIN.search(one["metadata"]["name"])
        and any(_DEVICE_PLUGIN.search(text) for text in (one["metadata"]["name"], *images(one)))
    ]
    install = (
        "Install it from cluster/platform (or the GPU Operator, which brings it). Its pods need "
        "the driver on the node, and a toleration for the node's taints."
    )
    if not plugins and any(placement.gpus(node) for node in cluster.list("nodes")):
        yield warning(
            check,
            "no daemonset of it, though nodes offer GPUs",
            "Some providers build it into their nodes. In that case, do nothing.",
        )
    elif not plugins:
        yield failed(check, "no daemonset of it: no node can offer nvidia.com/gpu", install)
    for plugin in plugins:
        status = plugin.get("status") or {}
        wanted, ready = status.get("desiredNumberScheduled", 0), status.get("numberReady", 0)
        found = f"{full_name(plugin)}, ready on {ready} of {wanted} nodes"
        if wanted == 0:
            yield warning(
                check,
                found,
                "It selects no node. That is correct while there is no GPU node. Otherwise check "
                "its nodeSelector and affinity (with feature discovery it waits for the label "
                "nvidia.com/gpu.present or feature.node.kubernetes.io/pci-10de.present).",
            )
        elif ready < wanted:
            yield failed(
                check,
                found,
                f"Look at its pods: `kubectl -n {plugin['metadata']['namespace']} get pods -o "
                "wide`, and their logs. Usually the node has no driver, or NVIDIA's runtime is not "
                "containerd's default and the plugin has no runtimeClassName.",
            )
        else:
            yield ok(check, found)


def check_gpu_nodes(cluster: Cluster, services: Sequence[Object]) -> Iterator[Finding]:
    check = "GPU nodes"
    nodes = cluster.list("nodes")
    offering = [node for node in nodes if placement.gpus(node)]
    idle = [
        node["metadata"]["name"]
        for node in nodes
        if not placement.gpus(node)
        and (
            (node["metadata"].get("labels") or {}).get("nvidia.com/gpu.present") == "true"
            or ((node.get("status") or {}).get("capacity") or {}).get("nvidia.com/gpu", "0") != "0"
        )
    ]
    if idle:
        yield failed(
            check,
            f"{', '.join(idle)}: GPUs are present, and none is allocatable",
            "Read the log of the device plugin on the node. The driver does not load, the GPUs "
            "are unhealthy (Xid errors in `dmesg`), or MIG is on without instances.",
        )
    if not offering:
        if not idle:
            found = f"none of {len(nodes)} offers nvidia.com/gpu"
            advice = (
                "Add a GPU node; if a node group scales from zero, let it start one node first. If "
                "there is one, its driver or the device plugin does not work."
            )
            asking = [
                group
                for service in services
                for group in placement.groups(service)
                if any(name.startswith("nvidia.com/") for name in placement.requests(group.pod))
            ]
            if asking and all(group.may_be_empty for group in asking):
                yield warning(check, found, f"{places.STARTS_EMPTY}\n{advice}")
            else:
                yield failed(check, found, advice)
        return
    kinds = Counter(
        (shortage.product(node), resource, number)
        for node in offering
        for resource, number in placement.gpus(node).items()
    )
    found = ", ".join(
        f"{nodes_of} with {number} {resource} ({product})"
        for (product, resource, number), nodes_of in sorted(kinds.items())
    )
    unlabelled = [one["metadata"]["name"] for one in offering if not shortage.has_product(one)]
    shared = [one["metadata"]["name"] for one in offering if _is_shared(one)]
    if unlabelled:
        yield warning(
            check,
            f"{found}; {', '.join(unlabelled)}: no label nvidia.com/gpu.product",
            "GPU feature discovery does not run there, and components such as gpu-l4 select by its "
            "labels: switch it on with the device plugin's value gfd.enabled=true.",
        )
    else:
        yield ok(check, found)
    if shared:
        yield warning(
            "GPU sharing",
            f"{', '.join(shared)}: GPUs are time-sliced or shared through MPS",
            "Pods that share a GPU also share its memory. Remove `sharing` from the device "
            "plugin's configuration for these nodes, or keep the service off them. If one GPU "
            "must serve several pods, use MIG.",
        )


def _is_shared(node: Object) -> bool:
    labels = node["metadata"].get("labels") or {}
    replicas = labels.get("nvidia.com/gpu.replicas", "1")
    return labels.get("nvidia.com/gpu.sharing-strategy", "none") != "none" or (
        replicas.isdecimal() and int(replicas) > 1
    )
