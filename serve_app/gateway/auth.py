"""API keys, stored by their hashes, with a name, limits and models each."""

import base64
import contextlib
import hashlib
import hmac
import logging
import math
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import yaml
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.errors import ConfigError, CrossSite, DiffusionServeError, InvalidKey, RateLimited
from serve_app.gateway.errors import problem_of
from serve_app.gateway.requests_log import record_of
from serve_app.protocol.params import Priority

logger = logging.getLogger(__name__)

REREAD_EVERY_S = 5.0
"""Least time between two checks of the file, so that keys change without a restart."""


ANONYMOUS = "anonymous"
"""Principal of every request, on a server without keys."""


class ApiKey(BaseModel):
    """One entry of the file or of the environment. It has the hash of the key, not the key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        min_length=1, max_length=64, description="Name of the client in logs and metrics."
    )
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of the key, in hexadecimal.")
    requests_per_minute: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Most requests in a minute, for each gateway replica. Default: no limit."
    )
    max_concurrent: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Most requests at a time, for each gateway replica. Default: no limit."
    )
    priority: Priority = Field(
        "interactive", description="'batch': its requests run when no interactive request can."
    )
    models: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None,
        description="Models that it may use, by their `id`. To its requests there are no others, "
        "and those that name none go to the first one. Default: all models.",
    )


class Principal(NamedTuple):
    """Identity of an authenticated request."""

    name: str
    priority: Priority
    models: tuple[str, ...] | None = None
    """Models that it may use, by their ids; ``None`` for all."""


def principal_of(key: ApiKey | None) -> Principal:
    """Return the principal of a key, or `ANONYMOUS` without one."""
    if key is None:
        return Principal(ANONYMOUS, "interactive")
    return Principal(key.name, key.priority, key.models)


def digest(key: str) -> str:
    """Hash a key as entries have it. Keys are random and long, so a fast hash is enough."""
    return hashlib.sha256(key.encode()).hexdigest()


def _key_in(authorization: str | None) -> str:
    """Return the key of a header: a Bearer token, or the password of Basic.

    Raises:
        InvalidKey: if it has none.
    """
    _, _, given = (authorization or "").partition(" ")
    key = ""
    match _scheme_of(authorization):
        case "bearer":
            key = given.strip()
        case "basic":
            with contextlib.suppress(ValueError):  # of the base64, or of the text in it
                _, _, key = base64.b64decode(given.strip(), validate=True).decode().partition(":")
    if not key:
        raise InvalidKey(
            "no API key: send the header 'Authorization: Bearer KEY', or Basic with the key as "
            "password."
        )
    return key


def _scheme_of(authorization: str | None) -> str:
    return (authorization or "").partition(" ")[0].lower()


def parse_keys(text: str, source: str) -> list[ApiKey]:
    """Parse the entries in ``text``, which is YAML.

    Raises:
        ConfigError: naming ``source`` and the entry. It does not repeat the entry.
    """
    try:
        keys = TypeAdapter(list[ApiKey]).validate_python(yaml.safe_load(text) or [])
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" (line {mark.line + 1})"
        raise ConfigError(f"{source}: the API keys are not YAML{where}.") from None
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the whole"
        raise ConfigError(
            f"{source}: {where}: {problem['msg']}. It must be a list of entries with name, sha256, "
            "and optionally requests_per_minute, max_concurrent, priority and models; "
            "`diffusion-serve key` makes them."
        ) from None
    return keys


def _check_distinct(keys: Sequence[ApiKey]) -> None:
    for field in ("name", "sha256"):
        counts = Counter(getattr(key, field) for key in keys)
        twice = [value for value, count in counts.items() if count > 1]
        if twice:
            raise ConfigError(f"two API keys have the {field} {twice[0]!r}; each needs its own.")


class KeyRing:
    """The keys of one gateway replica. Without any, every request is admitted."""

    def __init__(
        self, path: Path | None, environment: str | None, models: Sequence[str] | None = None
    ) -> None:
        """Read the keys.

        Args:
            path: the file.
            environment: entries beside those of the file.
            models: ids of the server's models; it logs the names in entries that are no such id.

        Raises:
            ConfigError: if entries are wrong, or the file cannot be read.
        """
        self._path = path
        self._environment = environment or ""
        self._models = models
        self._version: tuple[float, int] | None = None
        self._checked_at = -math.inf
        self._keys: list[ApiKey] = []
        self._running: Counter[str] = Counter()
        self._rates = MovingWindowRateLimiter(MemoryStorage())
        self._read()

    def __bool__(self) -> bool:
        """Return whether a key is required, as it is while a configured file has no entries."""
        return bool(self._keys) or self._path is not None

    @property
    def principals(self) -> list[Principal]:
        """Principals that the current keys admit."""
        return [principal_of(key) for key in self._keys] if self else [principal_of(None)]

    def recognise(self, authorization: str | None) -> ApiKey | None:
        """Return the key of a request; ``None`` where no key is required.

        Raises:
            InvalidKey: if the header has no known key.
        """
        self._refresh()
        return self._find(authorization) if self else None

    def enter(self, key: ApiKey | None) -> Principal:
        """Count a request of this key; call `leave` with the principal's name when it is done.

        Raises:
            RateLimited: if the key's limits are used up.
        """
        if key is None:
            return principal_of(key)
        if key.max_concurrent is not None and self._running[key.name] >= key.max_concurrent:
            raise RateLimited(
                f"the key {key.name!r} has reached its limit of {key.max_concurrent} requests at a "
                "time.",
                retry_after_s=1.0,
            )
        if key.requests_per_minute is not None:
            rate = RateLimitItemPerMinute(key.requests_per_minute)
            if not self._rates.hit(rate, key.name):
                wait_s = self._rates.get_window_stats(rate, key.name).reset_time - time.time()
                raise RateLimited(
                    f"the key {key.name!r} has reached its limit of {key.requests_per_minute} "
                    "requests a minute.",
                    retry_after_s=wait_s,
                )
        self._running[key.name] += 1
        return principal_of(key)

    def leave(self, name: str) -> None:
        self._running[name] -= 1

    def unknown_models(self, here: Sequence[str]) -> Iterator[str]:
        """Yield a warning for each key that names models that are not here.

        They are no error: servers may share a file, and models come and go while the file stays.
        """
        for key in self._keys:
            unknown = [name for name in key.models or () if name not in here]
            if unknown:
                yield (
                    f"the API key {key.name!r} may use {', '.join(map(repr, unknown))}, and there "
                    f"is no model with this id: the ids are {', '.join(map(repr, here))}."
                )

    def _find(self, authorization: str | None) -> ApiKey:
        presented = digest(_key_in(authorization))
        found = None
        for key in self._keys:  # compare with all, so that the duration reveals nothing
            if hmac.compare_digest(presented, key.sha256):
                found = key
        if found is None:
            raise InvalidKey("this API key is not known here.")
        return found

    def _refresh(self) -> None:
        now = time.monotonic()
        if self._path is None or now - self._checked_at < REREAD_EVERY_S:
            return
        self._checked_at = now
        try:
            self._read()
        except ConfigError as error:
            logger.error(
                "the earlier API keys stay valid, because the new ones are wrong: %s", error
            )

    def _read(self) -> None:
        """Read the entries if the file has changed."""
        keys = parse_keys(self._environment, "the environment")
        if self._path is not None:
            try:
                status = self._path.stat()
                version = (status.st_mtime, status.st_size)
                if version == self._version:
                    return
                text = self._path.read_text(encoding="utf-8")
                self._version = version  # set late, so that a failed read is repeated
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"the API keys in {self._path} cannot be read: {error}") from None
            keys += parse_keys(text, str(self._path))
        _check_distinct(keys)
        self._keys = keys
        if self._models is not None:
            for warning in self.unknown_models(self._models):
                logger.warning("%s", warning)


class KeyGuard:
    """ASGI middleware that authenticates requests. A stream counts until it ends.

    Requests from pages of other web sites that the config does not list need a Bearer key. Without
    keys, all others are admitted. Browsers send the JSON of such pages as plain text, without a
    preflight request, and add a Basic password that they know.

    Every path that is not listed as open is guarded. Paths are relative to the application's mount
    point, by the function that Starlette's routes use.
    """

    def __init__(
        self, app: ASGIApp, keys: KeyRing, open_paths: Collection[str], origins: Collection[str]
    ) -> None:
        """Set the paths that need no key; one that ends in a slash includes all paths below.

        ``origins`` are those of web pages that may use the server, or ``*`` for all pages.
        """
        self._origins = origins
        self._app = app
        self._keys = keys
        self._open = frozenset(open_paths)
        self._open_below = tuple(path for path in open_paths if path.endswith("/") and path != "/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(get_route_path(scope)):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            authorization = headers.get("authorization")
            by_itself = not self._keys or _scheme_of(authorization) == "basic"
            if by_itself and not self._may_ask(headers):
                raise CrossSite(
                    "a page of another web site may not use this server without a Bearer key. "
                    "The server's operator can list its origin in gateway.cors_origins."
                )
            key = self._keys.recognise(authorization)
            record = record_of(scope)
            known = principal_of(key)
            record.principal, record.priority = known.name, known.priority
            principal = self._keys.enter(key)
        except DiffusionServeError as error:
            await problem_of(error, scope).response()(scope, receive, send)
            return
        scope.setdefault("state", {})["principal"] = principal
        try:
            await self._app(scope, receive, send)
        finally:
            self._keys.leave(principal.name)

    def _may_ask(self, headers: Headers) -> bool:
        """Return False for a request that a page of another web site sent uninvited."""
        if headers.get("sec-fetch-site") != "cross-site" or "*" in self._origins:
            return True
        return headers.get("origin") in self._origins

    def _is_open(self, path: str) -> bool:
        return path in self._open or path.startswith(self._open_below)
