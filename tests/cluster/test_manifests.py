"""Every overlay, and every combination that the pages name, against all rules; and every
rule against a one-line edit that breaks it."""

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from tests.cluster.manifests import KUBECTL, Manifests, RenderError, render
from tests.cluster.platform_rules import SECTION as PLATFORM_SECTION
from tests.cluster.rules import RULES, problems
from tests.pages import KUBERNETES, OWN_OVERLAY, section

# Ray 2.60 has nothing else yet that works.
pytestmark = [
    pytest.mark.usefixtures("crds"),
    pytest.mark.filterwarnings("ignore:The .metrics_interval_s. field:DeprecationWarning"),
]

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
OVERLAYS = sorted(path.name for path in (CLUSTER / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (CLUSTER / "components").iterdir())


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Copy cluster/ and related folders for edits."""
    for folder in ("cluster", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copytree(ROOT / "docs/operate", tmp_path / "docs/operate")
    return tmp_path


def named_combinations() -> list[list[str]]:
    """Read the combinations of the page: commas separate them, plus signs join components."""
    text = section(ROOT, OWN_OVERLAY, "Components")
    sentence = text[text.index("Checked combinations:") :].partition("\n\n")[0]
    found = [
        re.findall("`([a-z0-9-]+)`", part)
        for part in sentence.replace(" alone", "").split(",")
        if "`" in part
    ]
    assert len(found) > 3
    return found


def overlay(root: Path, components: list[str]) -> Path:
    """Write an overlay with these components on the base."""
    folder = root / "cluster/overlays/own"
    folder.mkdir()
    production = (root / "cluster/overlays/production/kustomization.yaml").read_text()
    head, _, tail = production.partition("components:\n")
    lines = "".join(f"  - ../../components/{name}\n" for name in components)
    tail = tail[tail.index("replacements:") :]
    (folder / "kustomization.yaml").write_text(f"{head}components:\n{lines}{tail}")
    return folder


def edit(file: Path, old: str, new: str, times: int = 1) -> None:
    text = file.read_text()
    assert text.count(old) >= times, f"{file} has no {old!r}"
    file.write_text(text.replace(old, new, times))


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays_keep_all_rules(name: str) -> None:
    assert problems(render(CLUSTER / "overlays" / name)) == []


@pytest.mark.parametrize("components", named_combinations(), ids="+".join)
def test_combinations_keep_all_rules(copy: Path, components: list[str]) -> None:
    if "scale-to-zero" in components:  # as the page says
        edit(copy / "configs/sdxl.yaml", "min_replicas: 1", "min_replicas: 0")
    assert problems(render(overlay(copy, components))) == []


@pytest.mark.parametrize("component", COMPONENTS)
def test_each_component_keeps_all_rules_alone(copy: Path, component: str) -> None:
    needs = {"mig": ["gpu-h100"], "spot": ["gpu-l4"]}.get(component, [])
    if component == "scale-to-zero":
        edit(copy / "configs/sdxl.yaml", "min_replicas: 1", "min_replicas: 0")
    assert problems(render(overlay(copy, [*needs, component]))) == []


@pytest.mark.parametrize("component", COMPONENTS)
def test_each_component_has_a_readme(component: str) -> None:
    readme = (CLUSTER / "components" / component / "README.md").read_text()
    assert readme.startswith(f"# {component}\n")
    assert len(readme.splitlines()) > 3


def test_an_image_from_a_registry_keeps_its_tag(copy: Path) -> None:
    folder = copy / "cluster/overlays/production"
    edit(
        folder / "kustomization.yaml",
        "replacements:",
        "images: [{name: diffusion-serve, newName: registry.example.com/team/diffusion-serve}]\n"
        "replacements:",
    )
    manifests = render(folder)
    images = {container["image"] for pod in manifests.pods for container in pod.containers}
    assert images == {
        "registry.example.com/team/diffusion-serve:0.1.0-gpu",
        "registry.example.com/team/diffusion-serve:0.1.0-cpu",
        "redis:8.6.3-alpine",
    }
    assert problems(manifests) == []


def test_the_smoke_test_of_the_platform_keeps_all_rules() -> None:
    smoke = yaml.safe_load((CLUSTER / "platform/gpu-smoke.yaml").read_text())
    production = render(CLUSTER / "overlays/production")
    manifests = Manifests(production.folder, [*production.documents, smoke])
    assert [pod.document["kind"] for pod in manifests.pods][-1] == "Pod"
    assert problems(manifests) == []


def test_the_smoke_test_is_given_the_runtime_class_by_the_command_that_is_shown() -> None:
    page = section(ROOT, KUBERNETES, PLATFORM_SECTION)
    shown = re.search(r"^kubectl (patch .*?) \| kubectl create", page.replace("\\\n", ""), re.M)
    assert shown is not None
    done = subprocess.run(
        f"{KUBECTL} {shown[1]}", shell=True, cwd=ROOT, capture_output=True, text=True, check=True
    )
    [runtime] = yaml.safe_load_all((CLUSTER / "platform/runtimeclass.yaml").read_text())
    smoke = yaml.safe_load((CLUSTER / "platform/gpu-smoke.yaml").read_text())
    smoke["spec"]["runtimeClassName"] = runtime["metadata"]["name"]
    [container] = smoke["spec"]["containers"]
    container["image"] = f"registry.example.com/{container['image']}"
    assert yaml.safe_load(done.stdout) == smoke


def test_components_that_exclude_each_other_are_documented(copy: Path) -> None:
    edit(copy / "configs/sdxl.yaml", "min_replicas: 1", "min_replicas: 0")
    with pytest.raises(RenderError, match="test"):
        render(overlay(copy, ["gpu-l4", "spot", "scale-to-zero"]))


def test_an_order_that_omits_a_group_is_reported(copy: Path) -> None:
    manifests = render(overlay(copy, ["gpu-l4", "spot", "runtime-class"]))
    assert any("gpu-spot" in line and "runtimeClassName" in line for line in problems(manifests))


@dataclass(frozen=True)
class Break:
    """An entry of breaks.yaml."""

    rule: str
    file: str
    old: str
    new: str
    says: list[str]
    overlay: str = "production"
    components: list[str] = field(default_factory=list)


BREAKS = [
    Break(**entry) for entry in yaml.safe_load(Path(__file__).with_name("breaks.yaml").read_text())
]


@pytest.mark.parametrize("broken", BREAKS, ids=lambda one: f"{one.rule}: {one.new.strip()[:40]}")
def test_a_broken_rule_is_found_with_file_and_field(copy: Path, broken: Break) -> None:
    if broken.components:
        folder = overlay(copy, broken.components)
    else:
        folder = copy / "cluster/overlays" / broken.overlay
    edit(copy / broken.file, broken.old, broken.new)
    manifests = render(folder)
    [rule] = [one for one in RULES if one.__name__ == broken.rule]
    found = list(rule(manifests))
    assert any(all(part in line for part in (*broken.says, broken.file)) for line in found), found


def test_every_rule_is_broken_once() -> None:
    assert {rule.__name__ for rule in RULES} == {broken.rule for broken in BREAKS}


def test_a_strategic_merge_of_workers_would_be_caught(copy: Path) -> None:
    """It replaces the whole list: the group has no pod template any more."""
    file = copy / "cluster/overlays/production/kustomization.yaml"
    file.write_text(
        file.read_text()
        + """  - patch: |-
      apiVersion: ray.io/v1
      kind: RayService
      metadata:
        name: diffusion-serve
      spec:
        rayClusterConfig:
          workerGroupSpecs:
            - groupName: gpu
              minReplicas: 1
              maxReplicas: 4
"""
    )
    assert any("template" in line for line in problems(render(file.parent)))
