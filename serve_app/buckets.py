"""Buckets of S3 and of Google Cloud Storage. Needs obstore, so only uses of a bucket import it."""

from datetime import timedelta

from obstore.exceptions import BaseError
from obstore.store import GCSStore, S3Store

FAILURES = (BaseError, OSError)  # a timeout is an OSError
"""What a request to a bucket raises."""


def open_bucket(url: str, within_s: float) -> S3Store | GCSStore:
    """Open the bucket of an ``s3://`` or ``gs://`` URL, without a request to it.

    The environment has the credentials. Each request takes at most ``within_s`` seconds.

    Raises:
        BaseError: of obstore, or `ValueError`: if the URL or the environment cannot be used.
    """
    seconds = timedelta(seconds=1)
    store = GCSStore if url.startswith("gs://") else S3Store
    return store.from_url(
        url,
        # Without TLS only where the environment names such an endpoint.
        client_options={
            "allow_http": True,
            "connect_timeout": 3 * seconds,
            "timeout": within_s * seconds,
        },
        retry_config={"max_retries": 2, "retry_timeout": within_s / 2 * seconds},
    )


def reason_of(error: Exception) -> str:
    """Say in a line what went wrong."""
    first, *_ = str(error).splitlines() or [""]
    unnamed = "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__
    return first[:500] or unnamed
