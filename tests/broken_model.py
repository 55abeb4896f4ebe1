"""A model folder that passes every check before a start, and that no replica can load."""

import json
import shutil
from pathlib import Path

from serve_app.config.source import DEMO_MODEL_DIR


def broken_folder(path: Path) -> Path:
    """Copy the demo with a configuration that does not fit the shapes of its weights.

    Only a replica finds that: the checks before a start do not build networks.
    """
    shutil.copytree(DEMO_MODEL_DIR, path)
    config = path / "unet" / "config.json"
    content = json.loads(config.read_text())
    content["cross_attention_dim"] *= 2
    config.write_text(json.dumps(content))
    return path
