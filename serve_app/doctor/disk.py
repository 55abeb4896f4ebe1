"""Checks of disks: room for the weights to download, and for Ray's session."""

import os
import shutil
from pathlib import Path

from serve_app.config.models import ModelConfig
from serve_app.config.source import is_path
from serve_app.doctor import weights
from serve_app.doctor.report import Finding, failed, gib, ok
from serve_app.errors import ModelLoadError

_NEEDED_DISK_BYTES = 10 * 2**30
"""Room for a model of unknown size: about the smallest full-size one, SDXL in fp16, with room for
its download."""


def check_disk(model: ModelConfig) -> Finding:
    """Check the room for the weights where they will be downloaded."""
    sources = [model.source, *filter(None, model.components.values())]
    if all(map(is_path, sources)):
        rest = "nothing is" if model.layout is not None else "only configurations are"
        return ok("disk", f"the weights are in {', '.join(sources)}, {rest} downloaded")
    folder = weights.cache_folder()
    try:
        there = weights.read_components(model)
    except ModelLoadError:  # the row `model` reports it
        there = None
    if there is not None:
        return ok("disk", f"the weights are in the cache, {folder}")
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    found = f"{folder} has {gib(free)} free, for {model.source}"
    if not os.access(existing, os.W_OK):
        return failed(
            "disk",
            f"{existing} is not writable, and {model.source} is to be downloaded there",
            f"Point HF_HOME to a folder that user {os.getuid()} may write. On Kubernetes set "
            "securityContext.fsGroup of the pod. With Docker, chown the volume.",
        )
    if free < _NEEDED_DISK_BYTES:
        return failed(
            "disk",
            f"{found}; even a small model needs {gib(_NEEDED_DISK_BYTES)}",
            "Free space there (`hf cache ls` lists what is cached), or point HF_HOME to a larger "
            "disk. On Kubernetes mount a volume there, as the component `model-cache` does.",
        )
    return ok("disk", f"{found}, whose size is unknown before the download")


_RAY_FULL = 0.95
"""Ray's local_fs_capacity_threshold: Ray spills no objects to a disk fuller than this."""


def check_temporary_disk(folder: Path) -> Finding:
    """Check the room for Ray's session and logs."""
    usage = shutil.disk_usage(folder)
    # As `df` computes it: blocks reserved for root do not count.
    used = 1 - usage.free / max(usage.used + usage.free, 1)
    found = f"{folder} is {used:.0%} full, {gib(usage.free)} free"
    if used > _RAY_FULL:
        return failed(
            "disk for Ray",
            found,
            "Free space there, or start Ray with --temp-dir on another disk. Over "
            f"{_RAY_FULL:.0%}, Ray cannot spill objects. Its logs and sockets are there, too.",
        )
    return ok("disk for Ray", found)
