"""Addresses of stores in a config."""

from urllib.parse import unquote, urlsplit


def check_store(setting: str, url: str) -> None:
    """Check what holds for the address of every store, a bucket or a folder.

    Raises:
        ValueError: naming the setting, and the rule.
    """
    parts = urlsplit(url)
    shown = f"{setting} is {without_password(url)!r}"
    if parts.query or parts.fragment or parts.username is not None:
        raise ValueError(
            f"{shown}: leave out user, '?' and '#'. Credentials belong into the environment"
        )
    if parts.scheme != "file" and not parts.netloc:
        raise ValueError(f"{shown}, which names no bucket")
    if ".." in unquote(parts.path).split("/"):
        raise ValueError(f"{shown}: write it without '..'")


def without_password(url: str) -> str:
    """Return a URL as messages may show it."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
