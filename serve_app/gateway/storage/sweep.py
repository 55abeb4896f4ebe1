"""Removal of expired images from a folder. Buckets have rules of their own for it."""

import asyncio
import logging
from pathlib import Path

from serve_app.gateway.storage.names import ImageName

logger = logging.getLogger(__name__)

SWEEP_EVERY_S = 60.0


async def sweep_always(folder: Path) -> None:
    """Remove expired images again and again, as each gateway replica does."""
    while True:
        try:
            await asyncio.to_thread(sweep, folder)
        except OSError as error:
            logger.warning("expired images in %s cannot be removed: %s", folder, error)
        await asyncio.sleep(SWEEP_EVERY_S)


def sweep(folder: Path) -> None:
    """Remove the expired images of a folder, with what interrupted writes left of them.

    Raises:
        OSError: if the folder or a file cannot be read or changed.
    """
    for path in folder.iterdir():
        # While a file is written, its name ends in a number sign and a number.
        name = ImageName.parse(path.name.partition("#")[0])
        if name is not None and name.is_expired:
            path.unlink(missing_ok=True)  # another replica may be faster
