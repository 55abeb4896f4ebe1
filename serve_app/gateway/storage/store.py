"""The store of images. Only servers with storage import this module.

Requests to a store run in obstore's threads, not in the event loop, and each is bounded in time.
"""

import asyncio
import contextlib
import logging
import math
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta

import obstore
from obstore.exceptions import PermissionDeniedError
from obstore.store import GCSStore, LocalStore, S3Store

from serve_app.buckets import FAILURES, open_bucket, reason_of
from serve_app.config.storage import StorageConfig
from serve_app.errors import ConfigError, StorageAway
from serve_app.gateway.storage.names import ImageName

logger = logging.getLogger(__name__)

WITHIN_S = 20.0
"""Longest time of one upload or read, retries included."""
CHECKED_WITHIN_S = 3.0
"""Longest time to find out whether the store is there."""
TRUSTED_FOR_S = 10.0
"""Time after a write in which the store counts as there."""
AWAY_FOR_S = 2.0
"""Time after a failure in which the store counts as away, so that not every request waits."""

PROBE = "write-check"
"""Key of an empty object that shows whether the store takes any. No image has such a name."""

_ABSENT = (FileNotFoundError, PermissionDeniedError)
"""How a read fails without an image: S3 forbids it unless the credentials may list the bucket."""


class ImageStore:
    """The images of all gateway replicas, by their names."""

    def __init__(self, config: StorageConfig) -> None:
        """Open the store, without a request to it.

        Raises:
            ConfigError: if there cannot be such a store.
        """
        self._ttl_s = config.ttl_s
        self._signs = config.presigned
        try:
            self._store = _opened(config)
        except (*FAILURES, ValueError) as error:
            raise ConfigError(
                f"gateway.storage.url is {config.url!r}, which cannot be used: {reason_of(error)}"
            ) from None
        self._written_at = self._failed_at = -math.inf
        self._writing = _Logged("take images")
        self._reading = _Logged("return images")
        self._checking = asyncio.Lock()

    @property
    def seems_away(self) -> bool:
        """True shortly after a write that failed."""
        return time.monotonic() - self._failed_at < AWAY_FOR_S

    async def check(self) -> None:
        """Make sure that the store takes images. A write shortly before is proof enough.

        Raises:
            StorageAway: if it does not.
        """
        async with self._checking:  # one request asks, the others wait for the answer
            if self.seems_away:
                raise _unavailable()
            if time.monotonic() - self._written_at > TRUSTED_FOR_S:
                await self._put(PROBE, b"", "text/plain", CHECKED_WITHIN_S)

    async def put(self, name: ImageName, data: bytes) -> None:
        """Store an image.

        Raises:
            StorageAway: if the store does not take it.
        """
        await self._put(name.text, data, name.media_type, WITHIN_S)

    async def read(self, name: ImageName) -> bytes | None:
        """Return the file of an image; ``None`` if there is none.

        Raises:
            StorageAway: if the store does not answer.
        """
        async with self._bounded(WITHIN_S, self._reading):
            try:
                result = await obstore.get_async(self._store, name.text)
                return bytes(await result.bytes_async())
            except _ABSENT:
                return None

    async def size(self, name: ImageName) -> int | None:
        """Return the bytes of an image's file; ``None`` if there is none.

        Raises:
            StorageAway: if the store does not answer.
        """
        async with self._bounded(WITHIN_S, self._reading):
            try:
                return (await obstore.head_async(self._store, name.text))["size"]
            except _ABSENT:
                return None

    async def presigned(self, name: ImageName) -> str | None:
        """Return the store's own link to an image; ``None`` where links lead to the gateway.

        Raises:
            StorageAway: if there are no credentials to sign it.
        """
        store = self._store
        if not self._signs or isinstance(store, LocalStore):
            return None
        async with self._bounded(WITHIN_S, self._writing):
            lasts = timedelta(seconds=self._ttl_s)
            return await obstore.sign_async(store, "GET", name.text, lasts)

    async def _put(self, key: str, data: bytes, media_type: str, within_s: float) -> None:
        # What a store serves itself must not outlive its link in a cache.
        attributes = {"Content-Type": media_type, "Cache-Control": "private, no-cache"}
        kept = None if isinstance(self._store, LocalStore) else attributes  # a folder keeps none
        try:
            async with self._bounded(within_s, self._writing):
                # In one piece: an interrupted upload leaves nothing behind.
                await obstore.put_async(
                    self._store, key, data, attributes=kept, use_multipart=False
                )
        except StorageAway:
            self._failed_at, self._written_at = time.monotonic(), -math.inf
            raise
        self._failed_at, self._written_at = -math.inf, time.monotonic()

    @contextlib.asynccontextmanager
    async def _bounded(self, within_s: float, logged: "_Logged") -> AsyncIterator[None]:
        """Bound a request to the store, and report its failure."""
        try:
            async with asyncio.timeout(within_s):
                yield
        except FAILURES as error:
            logged.failed(error)
            raise _unavailable() from None
        logged.worked()


@dataclass
class _Logged:
    """Logs that the store fails, and that it works again, once each."""

    task: str
    is_failing: bool = False

    def failed(self, error: Exception) -> None:
        if not self.is_failing:
            self.is_failing = True
            logger.error("the storage cannot %s: %s", self.task, reason_of(error))

    def worked(self) -> None:
        if self.is_failing:
            self.is_failing = False
            logger.info("the storage can %s again", self.task)


def problem_with(config: StorageConfig) -> str | None:
    """Return why the store takes no images from this machine, or ``None``.

    A bucket gets an empty object. A folder is not even made.
    """
    if config.folder is not None:
        existing = next(path for path in (config.folder, *config.folder.parents) if path.exists())
        if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
            return None
        return f"{existing} is no folder that this user may write to"
    return asyncio.run(_problem_with_bucket(config))


async def _problem_with_bucket(config: StorageConfig) -> str | None:
    try:
        async with asyncio.timeout(CHECKED_WITHIN_S):
            store = _opened(config)
            await obstore.put_async(store, PROBE, b"", use_multipart=False)
            await obstore.head_async(store, PROBE)
    except (*FAILURES, ValueError) as error:
        return reason_of(error)
    return None


def cache_control(seconds: int) -> str:
    """Return how long a client may keep an image, which never changes."""
    return f"private, max-age={seconds}, immutable"


def _unavailable() -> StorageAway:
    return StorageAway(
        "the storage of images cannot be used now; try again later, or send response_format: "
        "b64_json."
    )


def _opened(config: StorageConfig) -> S3Store | GCSStore | LocalStore:
    assert config.url is not None
    if config.folder is not None:
        return LocalStore(config.folder, mkdir=True)
    return open_bucket(config.url, WITHIN_S)
