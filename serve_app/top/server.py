"""The HTTP client: fetches ``/metrics`` and turns failures into errors of this project."""

import http.client
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from serve_app.config.environment import API_KEY_VARIABLE
from serve_app.errors import ConfigError, InvalidKey, Unavailable
from serve_app.top.series import Series, parse, plain

ANSWER_WITHIN_S = 10.0
"""Timeout of a scrape; the default of Prometheus."""

ANSWER_BYTES = 64 * 2**20
"""Maximum size of a response; over a thousand replicas send less."""


@dataclass(frozen=True)
class Server:
    """A server and the API key for it."""

    url: str
    """The URL before ``/metrics``."""
    key: str | None = field(default=None, repr=False)

    @classmethod
    def at(cls, url: str, key: str | None) -> "Server":
        """Validate user input. Raises `ConfigError`."""
        # The HTTP client's error message would contain a key that it cannot send.
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ConfigError("the API key must consist of printable ASCII characters.")
        return cls(_checked(url), key)

    def scrape(self) -> "Series":
        """Fetch all replicas' metrics. Raises `Unavailable`, `InvalidKey` or `ConfigError`."""
        headers = {"Accept": "text/plain"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}/metrics", headers=headers)
        opener = urllib.request.build_opener(_NoRedirects)
        try:
            with opener.open(request, timeout=ANSWER_WITHIN_S) as response:
                text = response.read(ANSWER_BYTES).decode(errors="replace")
        except urllib.error.HTTPError as error:
            with error:
                raise self._error(error.code, error.reason) from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            why = getattr(error, "reason", error)
            why = getattr(why, "strerror", None) or why
            raise Unavailable(f"{self.url} does not respond: {plain(str(why))}.") from None
        return parse(text)

    def _error(self, status: int, reason: str) -> Exception:
        if status == 401:
            if self.key:
                return InvalidKey(f"{self.url} rejects this API key.")
            return InvalidKey(f"{self.url} requires an API key: set it in {API_KEY_VARIABLE}.")
        if status == 404:
            return ConfigError(
                f"{self.url}/metrics does not exist (404): the application is not deployed yet, "
                "the URL lacks its route_prefix, or another server listens there."
            )
        return Unavailable(f"{self.url} responds to GET /metrics with {status} {plain(reason)}.")


def _checked(url: str) -> str:
    url = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a wrong port or bracket
        right = False
    if not right or "@" in url or "?" in url or "#" in url or not url.isprintable() or " " in url:
        raise ConfigError(
            "the URL must look like http://127.0.0.1:8000, without a user name or key."
        )
    return url.rstrip("/").removesuffix("/metrics").rstrip("/")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirects: the key is for the named server only."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None
