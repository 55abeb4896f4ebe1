"""The walk with a model of one's own: the files that a reader makes keep all rules."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import pytest
import yaml

from serve_app import __version__
from serve_app.config.source import DEMO_MODEL_DIR
from tests.cluster.manifests import Manifests, render
from tests.cluster.rules import problems
from tests.pages import OWN_OVERLAY, section

# Ray 2.60 has nothing else yet that works.
pytestmark = [
    pytest.mark.usefixtures("crds"),
    pytest.mark.filterwarnings("ignore:The .metrics_interval_s. field:DeprecationWarning"),
]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Follow the page in a copy of the repository; return the folder of the reader's overlay."""
    for name in ("cluster", "configs", "docs/operate"):
        shutil.copytree(ROOT / name, tmp_path / name)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    for block in _runnable(section(ROOT, OWN_OVERLAY, "Deploy your own SDXL folder")):
        # The folder is in the images, and the rules look at it.
        script = block.replace("/models/my-sdxl", str(DEMO_MODEL_DIR))
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    return tmp_path / "cluster/overlays/my-sdxl"


def _runnable(text: str) -> list[str]:
    """Return the blocks of shell code without a marker."""
    blocks = re.findall(r"([^\n]*)\n```sh\n(.*?)\n```", text, re.S)
    return [block for before, block in blocks if not before.startswith("<!-- not run")]


def test_the_overlay_keeps_all_rules(folder: Path) -> None:
    manifests = render(folder)
    assert problems(manifests) == []
    [head, worker] = [pod.spec["containers"][0]["image"] for pod in manifests.pods]
    repository = f"registry.example.com/my-sdxl/diffusion-serve:{__version__}"
    assert (head, worker) == (f"{repository}-cpu", f"{repository}-gpu")
    assert (folder.parents[2] / "keys.yaml").read_text().startswith("- name: first-app\n")


def test_the_overlay_with_a_volume_keeps_all_rules(folder: Path) -> None:
    file = folder / "kustomization.yaml"
    page = section(ROOT, OWN_OVERLAY, "The folder on a volume")
    [patch] = re.findall(r"```yaml\n(.*?)```", page, re.S)
    text = file.read_text()
    assert text.count("patches:\n") == text.count("gpu-l4\n") == 1
    text = text.replace("gpu-l4\n", "gpu-l4\n  - ../../components/model-folder\n")
    file.write_text(text.replace("patches:\n", f"patches:\n{indent(patch, '  ')}"))
    manifests = render(folder)
    assert problems(manifests) == []
    [claim] = manifests.of_kind("PersistentVolumeClaim")
    assert claim["spec"]["storageClassName"] == "standard-rwx"
    [(name, value)] = claim["metadata"]["labels"].items()
    assert f"--selector {name}={value}" in page
    for pod in manifests.pods:
        mounts = {one["mountPath"]: one for one in pod.spec["containers"][0]["volumeMounts"]}
        assert mounts["/models"]["readOnly"]
    loader = yaml.safe_load((ROOT / "cluster/components/model-folder/loader.yaml").read_text())
    with_loader = Manifests(manifests.folder, [*manifests.documents, loader])
    assert with_loader.pods[-1].document["kind"] == "Pod"
    assert problems(with_loader) == []
