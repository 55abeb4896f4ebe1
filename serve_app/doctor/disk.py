"""Checks of disks: room for the weights to download, and for Ray's session."""

import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from serve_app.config.models import ModelConfig
from serve_app.config.source import is_path
from serve_app.doctor import weights
from serve_app.doctor.report import Finding, failed, gib, ok
from serve_app.errors import ModelLoadError

_NEEDED_DISK_BYTES = 10 * 2**30
"""Room for a model of unknown size: about the smallest full-size one, SDXL in fp16, with room for
its download."""


def check_disk(*models: ModelConfig) -> Finding:
    """Check the room for the weights of models where they will be downloaded, all together."""
    downloaded = [model for model in models if not all(map(is_path, _sources(model)))]
    if not downloaded:
        rest = (
            "only configurations are"
            if any(model.layout is None for model in models)
            else "nothing is"
        )
        return ok("disk", f"the weights are in {_named(models)}, {rest} downloaded")
    folder = weights.cache_folder()
    missing = {model.source: model for model in downloaded if not _is_there(model)}
    if not missing:
        return ok("disk", f"the weights are in the cache, {folder}")
    names = ", ".join(missing)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    found = f"{folder} has {gib(free)} free, for {names}"
    if not os.access(existing, os.W_OK):
        return failed(
            "disk",
            f"{existing} is not writable, and {names} {_verb(missing)} to be downloaded there",
            f"Point HF_HOME to a folder that user {os.getuid()} may write. On Kubernetes set "
            "securityContext.fsGroup of the pod. With Docker, chown the volume.",
        )
    needed = len(missing) * _NEEDED_DISK_BYTES
    if free < needed:
        least = "even a small model needs" if len(missing) == 1 else "even small models need"
        return failed(
            "disk",
            f"{found}; {least} {gib(needed)}",
            "Free space there (`hf cache ls` lists what is cached), or point HF_HOME to a larger "
            "disk. On Kubernetes mount a volume there, as the component `model-cache` does.",
        )
    return ok("disk", f"{found}, whose size is unknown before the download")


def _sources(model: ModelConfig) -> list[str]:
    return [model.source, *filter(None, model.components.values())]


def _named(models: Sequence[ModelConfig]) -> str:
    return ", ".join(dict.fromkeys(source for model in models for source in _sources(model)))


def _verb(missing: Collection[str]) -> str:
    return "is" if len(missing) == 1 else "are"


def _is_there(model: ModelConfig) -> bool:
    try:
        return weights.read_components(model) is not None
    except ModelLoadError:  # the row `model` reports it
        return False


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
