"""What becomes of every request for pictures: one line in the log, and its metrics."""

import logging
import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from prometheus_client import Counter, Histogram
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.engine.params import GenerationParams
from serve_app.errors import DiffusionServeError
from serve_app.gateway.schemas import PARTS, Timings
from serve_app.metrics import FIRST_PARTIAL, REQUEST, REQUEST_PART, REQUESTS

logger = logging.getLogger(__name__)

NOBODY = "none"
"""Who has no key where one is asked for."""

_EXEMPLAR = re.compile(r"[A-Za-z0-9_.:/+=-]{1,100}")
"""Clients choose the ids of their requests: an exemplar takes 128 characters with its name, and
parsers stumble over quotes and braces in there."""


@dataclass
class Record:
    """One request. Whoever knows more writes it down here."""

    request_id: str
    received_at: float = field(default_factory=time.perf_counter)
    guest: str = NOBODY
    """The name of its key."""
    pictures: Sequence[GenerationParams] = ()
    """What it asks for, once that was found right."""
    outcome: str = "cancelled"
    """The client went away, unless somebody says otherwise."""
    timings: Timings | None = None
    """If it was painted."""
    first_partial_s: float | None = None

    @property
    def age_s(self) -> float:
        return time.perf_counter() - self.received_at

    def completed(self, timings: Timings) -> None:
        """The answer is ready to be sent."""
        self.outcome, self.timings = "completed", timings

    def failed(self, error: Exception) -> None:
        """This is what the client is told."""
        self.outcome = error.code if isinstance(error, DiffusionServeError) else "internal_error"

    def previewed(self) -> None:
        """A preview is ready to be sent."""
        if self.first_partial_s is None:
            self.first_partial_s = self.age_s


def record_of(scope: Scope) -> Record:
    """Of the request with this scope; one that nobody reads if it is not for pictures."""
    record = scope.get("state", {}).get("record")
    return record if isinstance(record, Record) else Record(request_id(scope))


def request_id(scope: Scope) -> str:
    """Serve's proxy gives every request an id, the client's own if it sent one, and returns it."""
    return Headers(scope=scope).get("x-request-id", "none")[:200]


class Recorder:
    """Keeps a `Record` of each request for pictures. Plain ASGI: until the last byte is sent."""

    def __init__(
        self, app: ASGIApp, model: str, paths: Collection[str], log_prompts: bool = False
    ) -> None:
        """``paths``: where pictures are asked for, as routes have them."""
        self._app = app
        self._model = model
        self._paths = frozenset(paths)
        self._log_prompts = log_prompts
        self._request = REQUEST.labels(model)
        self._first_partial = FIRST_PARTIAL.labels(model)
        self._parts: dict[str, Histogram] = {
            part: REQUEST_PART.labels(model, part) for part in PARTS
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] != "http"
            or scope["method"] != "POST"
            or get_route_path(scope) not in self._paths
        ):
            await self._app(scope, receive, send)
            return
        record = Record(request_id(scope))
        scope.setdefault("state", {})["record"] = record
        try:
            await self._app(scope, receive, send)
        except Exception as error:
            record.failed(error)
            raise
        finally:
            self._count(record)
            self._log(record)

    def _count(self, record: Record) -> None:
        requests: Counter = REQUESTS.labels(self._model, record.guest, record.outcome)
        requests.inc()
        plain = _EXEMPLAR.fullmatch(record.request_id)
        exemplar = {"request_id": record.request_id} if plain else None
        if record.first_partial_s is not None:
            self._first_partial.observe(record.first_partial_s, exemplar)
        if record.outcome == "completed" and record.timings is not None:
            timings = record.timings.until(record.age_s)
            self._request.observe(timings.total_s, exemplar)
            for part, seconds in timings.parts().items():
                self._parts[part].observe(seconds, exemplar)

    def _log(self, record: Record) -> None:
        """In words, and as fields for a log in JSON. No prompt unless somebody asked for that."""
        fields: dict[str, str | int | float] = {
            "request_id": record.request_id,
            "key": record.guest,
            "outcome": record.outcome,
        }
        what = ""
        if record.pictures:
            first, count = record.pictures[0], len(record.pictures)
            fields |= {
                "size": f"{first.width}x{first.height}",
                "steps": first.steps_to_run,
                "seed": first.seed,
                "images": count,
            }
            many = f"{count} pictures, " if count > 1 else ""
            what = " {size}, {steps} steps, {many}seed {seed}:".format(**fields, many=many)
        age_s = record.age_s
        fields["total_s"] = round(age_s, 4)
        parts = ""
        if record.timings is not None:
            spent = record.timings.until(age_s).parts()
            fields |= {f"{part}_s": round(seconds, 4) for part, seconds in spent.items()}
            parts = ", ".join(f"{part} {seconds:.3f}" for part, seconds in spent.items())
        if self._log_prompts and record.pictures:
            fields["prompt"] = record.pictures[0].prompt
        logger.info(
            "request %s of %s:%s %s after %.3f s%s%s",
            record.request_id,
            record.guest,
            what,
            record.outcome,
            age_s,
            f" ({parts})" if parts else "",
            f": {fields['prompt']!r}" if "prompt" in fields else "",
            extra=fields,
        )
