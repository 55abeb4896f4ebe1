"""Serve configs of the repository."""

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "configs"

SERVE_CONFIGS = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "kustomization.yaml")
