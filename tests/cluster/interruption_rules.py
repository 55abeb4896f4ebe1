"""Rules about ending pods: requests end first, and an eviction spares the last pod of a kind."""

from collections.abc import Iterator

from serve_app.doctor.deadlines import Link, chains, misorders
from serve_app.doctor.selectors import NO_GATEWAY
from tests.cluster.application import application, config_file
from tests.cluster.manifests import Manifests

HEAD_GROUP = "headgroup"
"""The head's value of KubeRay's label ray.io/group."""


def graces_are_in_order(manifests: Manifests) -> Iterator[str]:
    """Require: the longest request < the replica's grace <= the node's drain < the pod's grace <
    the delay after which an upgrade deletes the old cluster.

    As the doctor has it, with the graces that Serve itself gets from the code.
    """
    config = config_file(manifests)
    for misorder in misorders(manifests.service):
        files = [_file_of_link(manifests, one, config) for one in (misorder.link, misorder.before)]
        yield (
            f"RayService/diffusion-serve: {misorder.link.field} {misorder.found} "
            f"({'; '.join(dict.fromkeys(files))})"
        )
    _, deployed = application(manifests)
    known = {
        link.field.rpartition(" ")[2]: link.seconds
        for chain in chains(manifests.service)
        for link in chain
        if "graceful_shutdown_timeout_s" in link.field
    }
    for name, grace_s in known.items():
        if deployed[name].grace_s != grace_s:
            yield (
                f"the code gives {name} a grace of {deployed[name].grace_s:g}, and the chain of "
                f"deadlines has {grace_s:g} ({config})"
            )


def _file_of_link(manifests: Manifests, link: Link, config: str) -> str:
    return config if "serveConfigV2" in link.field else manifests.writes_field(link.field)


def budgets_select_pods(manifests: Manifests) -> Iterator[str]:
    """Require a budget for the head, and one for each group with a floor or with gateways.

    They count with minAvailable: RayClusters have no scale subresource to take a share of. A budget
    over several groups lets the last pod of one go while others have pods.
    """
    groups = {one["groupName"]: one for one in manifests.worker_groups}
    labels, least_pods = {}, {}
    for pod in manifests.pods:
        if pod.document["kind"] != "RayService":
            continue
        group = groups.get(pod.group or "", manifests.cluster["headGroupSpec"])
        name = pod.group or HEAD_GROUP
        # As KubeRay labels its pods; nobody can override these.
        labels[name] = pod.labels | group.get("labels", {}) | {"ray.io/group": name}
        labels[name]["ray.io/node-type"] = "worker" if pod.group else "head"
        least_pods[name] = group.get("minReplicas", 1)
    covered: list[str] = []
    budgets = manifests.of_kind("PodDisruptionBudget")
    for budget in budgets:
        where = f"PodDisruptionBudget/{budget['metadata']['name']}: spec"
        wanted = budget["spec"]["selector"]["matchLabels"]
        file = manifests.written_in(budget, "ray.io/group")
        selected = [name for name, own in labels.items() if wanted.items() <= own.items()]
        covered += selected
        if len(selected) != 1:
            what = " and ".join(selected) or "no group"
            yield f"{where}.selector: {wanted} selects {what}: write one ray.io/group ({file})"
            continue
        least = budget["spec"].get("minAvailable")
        file = manifests.written_in(budget, "minAvailable")
        if not isinstance(least, int):
            yield f"{where}: write minAvailable, a number ({file})"
        elif least > (most := max(1, least_pods[selected[0]])):
            yield f"{where}.minAvailable is {least}, and there are but {most} for sure ({file})"
    for name, least in least_pods.items():
        no_gateway = labels[name].items() >= NO_GATEWAY.items()
        if (least or not no_gateway) and covered.count(name) != 1:
            file = manifests.written_in(budgets[-1], "ray.io/group")
            yield (
                f"PodDisruptionBudget: {covered.count(name)} of them select the group {name}, "
                f"which has a floor or gateways: write one ({file})"
            )
