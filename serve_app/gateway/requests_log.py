"""What becomes of every request for pictures: one line in the log, and its metrics."""

import functools
import logging
import re
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import get_args

from prometheus_client import Histogram
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.errors import Cancelled, DiffusionServeError
from serve_app.gateway.schemas import PARTS, Timings
from serve_app.metrics import (
    FIRST_PARTIAL,
    OPEN_REQUESTS,
    OUTCOMES,
    REQUEST,
    REQUEST_PART,
    REQUESTS,
)
from serve_app.protocol.events import Timeline
from serve_app.protocol.params import GenerationParams, Priority

logger = logging.getLogger(__name__)

NOBODY = "none"
"""Who has no key where one is asked for."""

_EXEMPLAR = re.compile(r"[A-Za-z0-9_.:/+=-]{1,100}")
"""Clients choose the ids of their requests: an exemplar takes 128 characters with its name, and
parsers stumble over quotes and braces in there."""


@dataclass(eq=False)
class Record:
    """One request. Whoever knows more writes it down here."""

    request_id: str
    received_at: float = field(default_factory=time.perf_counter)
    principal: str = NOBODY
    """The name of its key."""
    priority: Priority = "interactive"
    """Of its key; who has none, or one that nobody knows, is as urgent as anybody."""
    pictures: Sequence[GenerationParams] = ()
    """What it asks for, once that was found right."""
    outcome: str = "cancelled"
    """The client went away, unless somebody says otherwise."""
    status: int = Cancelled.status
    """Of the outcome; a stream that fails has sent a 200 before."""
    engine_requests: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Which replica took which picture in, by its seed, and as which number."""
    painted: Timings | None = None
    """As it was when the last picture so far came here."""
    timings: Timings | None = None
    """If it was painted."""
    first_partial_s: float | None = None
    traceparent: str = ""
    """Of its span, as W3C's Trace Context has it; empty where nothing is traced."""
    sampled: bool = False
    """Its trace is kept: what its pictures go through is worth writing down."""
    timelines: dict[int, Timeline] = field(default_factory=dict)
    """How far its pictures have come, by their seeds, if that is worth writing down; the queue
    begins when it arrived."""

    @property
    def age_s(self) -> float:
        return time.perf_counter() - self.received_at

    def completed(self, timings: Timings) -> None:
        """The answer is ready to be sent."""
        self.outcome, self.status, self.timings = "completed", 200, timings

    def failed(self, error: Exception) -> None:
        """This is what the client is told."""
        ours = error if isinstance(error, DiffusionServeError) else DiffusionServeError("")
        self.outcome, self.status = ours.code, ours.status

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
        self,
        app: ASGIApp,
        model: str,
        paths: Collection[str],
        log_prompts: bool = False,
        principals: Iterable[tuple[str, Priority]] = (),
    ) -> None:
        """``paths``: where pictures are asked for, as routes have them.

        ``principals``: who may come, by the names of their keys, as far as is known now.
        """
        self._app = app
        self._model = model
        self._paths = frozenset(paths)
        self._log_prompts = log_prompts
        self._request = REQUEST.labels(model)
        self._first_partial = FIRST_PARTIAL.labels(model)
        self._parts: dict[str, Histogram] = {
            part: REQUEST_PART.labels(model, part) for part in PARTS
        }
        self._open: set[Record] = set()
        for priority in get_args(Priority):
            count = functools.partial(self._count_open, priority)
            OPEN_REQUESTS.labels(model, priority).set_function(count)
        self._known: set[tuple[str, Priority]] = set()
        for principal, priority in [(NOBODY, Record.priority), *principals]:
            self._expect(principal, priority)

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
        self._open.add(record)
        try:
            await self._app(scope, receive, send)
        except Exception as error:
            record.failed(error)
            raise
        finally:
            self._open.discard(record)
            self._count(record)
            self._log(record)

    def _count_open(self, priority: Priority) -> float:
        return sum(record.priority == priority for record in tuple(self._open))

    def _expect(self, principal: str, priority: Priority) -> None:
        """Have its counters at 0: one that appears with a failure has not risen, to Prometheus.

        16 series a key, 2 kB of what each gateway replica says: of 50 keys and 4 of them, 0.4 MB.
        """
        if (principal, priority) not in self._known:
            self._known.add((principal, priority))
            for outcome in OUTCOMES:
                REQUESTS.labels(self._model, principal, priority, outcome)

    def _count(self, record: Record) -> None:
        self._expect(record.principal, record.priority)  # a key that came with another file of keys
        REQUESTS.labels(self._model, record.principal, record.priority, record.outcome).inc()
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
            "key": record.principal,
            "priority": record.priority,
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
        if record.traceparent:
            fields["trace_id"] = record.traceparent.split("-")[1]
        age_s = record.age_s
        fields["total_s"] = round(age_s, 4)
        parts = ""
        if record.timings is not None:
            spent = record.timings.until(age_s).parts()
            fields |= {f"{part}_s": round(seconds, 4) for part, seconds in spent.items()}
            parts = ", ".join(f"{part} {seconds:.3f}" for part, seconds in spent.items())
            parts = f" ({parts})"
        backends = ", ".join(f"{replica}/{n}" for replica, n in record.engine_requests.values())
        if backends:
            fields["engine_request"] = backends
        if self._log_prompts and record.pictures:
            fields["prompt"] = record.pictures[0].prompt
        logger.info(
            "request %s of %s:%s %s after %.3f s%s%s%s",
            record.request_id,
            record.principal,
            what,
            record.outcome,
            age_s,
            parts,
            f" as {backends}" if backends else "",
            f": {fields['prompt']!r}" if "prompt" in fields else "",
            extra=fields,
        )
