"""The folder of the profiles that no setting names: beside the weights' cache, in HF_HOME.

A profile decides how requests share the pipeline, so nobody else may write one. Someone who may
write into HF_HOME itself can exchange the weights as well, so that folder is not checked.
"""

import hashlib
import json
import logging
import os
import stat
from pathlib import Path

from huggingface_hub import constants

from serve_app.engine.model.fingerprint import Fingerprint

logger = logging.getLogger(__name__)

MOST_PROFILES = 64
"""Profiles that are kept. Each new version of a package makes the ones before it useless."""


def profile_folder() -> Path | None:
    """Return the folder, made if there is none; ``None`` if it cannot be used, which is logged.

    It must belong to this user or to root. Others must not be able to write into it, except for the
    group of root: volumes of Kubernetes often belong to that.
    """
    folder = Path(constants.HF_HOME) / "diffusion-serve"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        logger.info("this start is not stored for the next one: %s", error)
        return None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (os.getuid(), 0):
        reason = "is not a folder of this user"
    elif found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and found.st_gid != 0):
        reason = "can be written by others: make it with mode 0700"
    else:
        return folder
    logger.warning(
        "this start is not stored for the next one: %s %s, or set engine.profile_path",
        folder,
        reason,
    )
    return None


def profile_name(fingerprint: Fingerprint) -> str:
    """Return the file name for starts with this fingerprint."""
    content = json.dumps(fingerprint, sort_keys=True).encode()
    return f"{hashlib.blake2b(content, digest_size=16).hexdigest()}.json"


def remove_old_profiles(folder: Path) -> None:
    """Remove all but the newest profiles. Another replica may do the same at the same time."""
    try:
        written = sorted((file.stat().st_mtime, file) for file in folder.glob("*.json"))
        for _, file in written[:-MOST_PROFILES]:
            file.unlink(missing_ok=True)
    except OSError as error:
        logger.info("old profiles in %s cannot be removed: %s", folder, error)
