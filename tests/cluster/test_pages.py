"""Numbers and names in the pages about Kubernetes, against the rendered manifests."""

import re
import shutil
from decimal import Decimal
from pathlib import Path

import pytest
from kubernetes.utils.quantity import parse_quantity

from serve_app.doctor.deadlines import chains
from serve_app.doctor.operator_rules import RULES
from tests.cluster.manifests import Manifests, render
from tests.cluster.schemas import WITHOUT_SCHEMA
from tests.pages import KUBERNETES, OWN_OVERLAY, UPGRADES, section

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
COMPONENTS = sorted(path.name for path in (CLUSTER / "components").iterdir())
OVERLAYS = sorted(path.name for path in (CLUSTER / "overlays").iterdir())

AUTOSCALER = {"cpu": "500m", "memory": "512Mi"}
"""Requests of the container that KubeRay adds to a head, unless autoscalerOptions has others."""


def _requested(manifests: Manifests, resource: str) -> Decimal:
    """Sum the requests of the head, its autoscaler and the least number of workers."""
    least = {group["groupName"]: group["minReplicas"] for group in manifests.worker_groups}
    total = Decimal(0)
    for pod in manifests.pods:
        times = 1 if pod.group is None else least[pod.group]
        for container in pod.spec["containers"]:
            total += times * parse_quantity(container["resources"]["requests"][resource])
    options = manifests.cluster["autoscalerOptions"]
    assert "resources" not in options
    return total + parse_quantity(AUTOSCALER[resource])


def test_the_resources_of_the_local_overlay_are_documented() -> None:
    manifests = render(CLUSTER / "overlays/local")
    text = " ".join(section(ROOT, KUBERNETES, "A laptop").split())
    told = re.findall(r"([\d.]+) CPUs and ([\d.]+) GiB of memory", text)
    needed = _requested(manifests, "cpu"), _requested(manifests, "memory") / 2**30
    assert [(Decimal(cpus), Decimal(gib)) for cpus, gib in told] == [needed]


def _told_kinds() -> dict[str, set[str]]:
    text = section(ROOT, OWN_OVERLAY, "Components")
    table = text[text.index("| component | kinds |") :].partition("\n\n")[0]
    told = {}
    for line in table.splitlines()[2:]:
        _, component, kinds, _, _ = line.split("|")
        told[component.strip(" `")] = set(re.findall("`(\\w+)`", kinds))
    return told


def _kinds(folder: Path) -> set[str]:
    """Return the kinds that are not Kubernetes' own."""
    groups = {"ray.io", *WITHOUT_SCHEMA}
    return {
        one["kind"]
        for one in render(folder).documents
        if one["apiVersion"].rpartition("/")[0] in groups
    }


def test_kinds_of_components_are_documented(tmp_path: Path) -> None:
    for name in ("cluster", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    found = {}
    for component in COMPONENTS:
        before = {"mig": ["gpu-h100"], "spot": ["gpu-l4"]}.get(component, [])
        folder = tmp_path / "cluster/overlays" / f"with-{component}"
        folder.mkdir()
        lines = "".join(f"  - ../../components/{name}\n" for name in [*before, component])
        (folder / "kustomization.yaml").write_text(
            "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
            f"resources: [../../base]\ncomponents:\n{lines}"
        )
        found[component] = _kinds(folder) - {"RayService"}
    told = _told_kinds()
    assert told.pop("all") == _kinds(CLUSTER / "overlays/local")
    assert told == {component: kinds for component, kinds in found.items() if kinds}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_order_of_deadlines_is_documented(overlay: str) -> None:
    text = section(ROOT, UPGRADES, "The chain of deadlines")
    told = re.search("longest request .*deletion delay .*", text)
    assert told is not None
    seconds = [float(number) for number in re.findall(r"\d+", told[0])]
    longest = max(
        chains(render(CLUSTER / "overlays" / overlay).service), key=lambda c: c[0].seconds
    )
    assert seconds == [link.seconds for link in longest]


def test_the_number_of_the_operators_rules_is_documented() -> None:
    text = section(ROOT, OWN_OVERLAY, "Deploy your own SDXL folder")
    assert f"by {len(RULES)} rules of KubeRay's operator" in " ".join(text.split())


def test_each_component_is_in_the_table_and_each_overlay_in_its() -> None:
    components = section(ROOT, OWN_OVERLAY, "Components").partition("\n\n| component | kinds |")[0]
    names = " ".join(re.findall(r"^\| (`.+?) \|", components, re.M))
    assert sorted(re.findall("`([a-z0-9-]+)`", names)) == COMPONENTS
    overlays = re.findall(
        r"^\| `([a-z-]+)` \|", section(ROOT, KUBERNETES, "Apply an overlay"), re.M
    )
    assert sorted(overlays) == OVERLAYS


@pytest.mark.parametrize(
    ("path", "after"),
    [
        (KUBERNETES, "kubectl apply -k cluster/overlays/production\n"),
        ("cluster/components/incremental-upgrade/README.md", "# incremental-upgrade\n"),
    ],
)
def test_documents_wait_for_a_gateway_that_kuberay_creates(path: str, after: str) -> None:
    name = render(CLUSTER / "overlays/production").service["metadata"]["name"]
    steps = (ROOT / path).read_text().partition(after)[2].partition("```\n\n")[0]
    assert f"wait gateway/{name}-gateway --for=condition=Programmed" in steps
