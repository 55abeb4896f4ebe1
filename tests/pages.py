"""Parts of the pages in docs/ that tests compare with the code and the manifests."""

from pathlib import Path

KUBERNETES = "docs/operate/kubernetes.md"
OWN_OVERLAY = "docs/operate/overlays.md"
UPGRADES = "docs/operate/upgrades.md"
CONTAINERS = "docs/operate/containers.md"


def section(root: Path, page: str, heading: str) -> str:
    """Return the text below a heading of the second level, up to the next one."""
    _, found, rest = (root / page).read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    assert found, f"{page} has no section {heading!r}"
    return rest.partition("\n## ")[0]
