"""The outcome of every image request: one line in the log, and its metrics."""

import functools
import itertools
import logging
import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

from prometheus_client import Histogram
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.errors import Cancelled, DiffusionServeError
from serve_app.gateway.schemas import PARTS, Timings
from serve_app.metrics.gateway import FIRST_PARTIAL, OPEN_REQUESTS, REQUEST, REQUEST_PART, REQUESTS
from serve_app.metrics.labels import OUTCOMES
from serve_app.protocol.backend import GenerationEvent
from serve_app.protocol.events import Progress, Queued, Timeline
from serve_app.protocol.images import EncodedImage
from serve_app.protocol.params import GenerationParams, Priority

logger = logging.getLogger(__name__)

NOBODY = "none"
"""Principal of a request without a key, on a server that requires one."""

_EXEMPLAR = re.compile(r"[A-Za-z0-9_.:/+=-]{1,100}")
"""Request ids that may be exemplars. Clients choose them, an exemplar has at most 128 characters
with its name, and parsers fail on quotes and braces."""


@dataclass(eq=False)
class RequestRecord:
    """Facts about one request, filled in by every part of the gateway that handles it."""

    request_id: str
    received_at: float = field(default_factory=time.perf_counter)
    model: str = ""
    """Name of its model: the default one until another is chosen."""
    principal: str = NOBODY
    """Name of its key."""
    priority: Priority = "interactive"
    """Priority of its key. Without a known key, it is interactive."""
    end_user: str | None = None
    """Name of the end user that the client gives."""
    images: Sequence[GenerationParams] = ()
    """Parameters of its images, once they are validated."""
    outcome: str = "cancelled"
    """Outcome label. Unless another one is set, the client went away."""
    status: int = Cancelled.status
    """HTTP status of the outcome. A stream that fails has sent a 200 before."""
    engine_requests: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Replica and request number of each admitted image, by the image's seed."""
    done: dict[int, float] = field(default_factory=dict)
    """Share of the steps that are done, by the image's seed, if progress was requested."""
    timings: Timings | None = None
    """Timings when the last image so far arrived, and those of the answer once it is complete."""
    completed: bool = False
    """Its answer was made."""
    first_partial_s: float | None = None
    traceparent: str = ""
    """Its span, in the format of W3C's Trace Context; empty if nothing is traced."""
    sampled: bool = False
    """Its trace is kept, so that timelines of its images are collected."""
    timelines: dict[int, Timeline] = field(default_factory=dict)
    """Progress of its images by their seeds, if the trace is kept. The queue part begins when the
    request arrived."""

    @property
    def age_s(self) -> float:
        return time.perf_counter() - self.received_at

    def note(self, seed: int, event: GenerationEvent) -> None:
        """Note the progress that ``event`` reports of the image with this seed."""
        match event:
            case Queued():  # again, if its replica was lost
                timeline = Timeline()
                if event.replica:
                    self.engine_requests[seed] = event.replica, event.number
            case Progress():
                self.done[seed] = event.step / event.total_steps
                return
            case Timeline():
                parts_s = parts_since_arrival(self.age_s, event.age_s, event.parts_s)
                timeline = replace(event, parts_s=parts_s)
            case EncodedImage():
                self.done[seed] = 1.0
                now_s = self.age_s
                parts_s = parts_since_arrival(now_s, event.age_s, event.timings)
                all_s = (*parts_s, max(0.0, now_s - sum(parts_s)))
                self.timings = Timings.of(all_s, event.calls)
                timeline = replace(event.timeline or Timeline(), parts_s=parts_s)
            case _:
                return
        if self.sampled:
            self.timelines[seed] = timeline

    def complete(self) -> Timings:
        """Note that the answer is made, and return its timings."""
        assert self.timings is not None
        self.timings = self.timings.until(self.age_s)
        self.outcome, self.status, self.completed = "completed", 200, True
        return self.timings

    def failed(self, error: Exception) -> None:
        """Note the error that the client receives."""
        ours = error if isinstance(error, DiffusionServeError) else DiffusionServeError("")
        self.outcome, self.status = ours.code, ours.status

    def previewed(self) -> None:
        """Note that a preview is ready to be sent."""
        if self.first_partial_s is None:
            self.first_partial_s = self.age_s


def parts_since_arrival(now_s: float, age_s: float, parts_s: Sequence[float]) -> tuple[float, ...]:
    """Convert the duration of each part from a replica's view to the gateway's.

    The request arrived at the gateway ``now_s`` ago, and at the replica ``age_s`` ago. Only
    durations are compared, because the clocks of two machines differ. Time that the replica does
    not account for was spent waiting for it, or on the way from it, and counts as queue. A replica
    whose clock runs faster reports too much, which is cut.
    """
    if not parts_s:
        return ()
    queue_s, *others = parts_s
    cut, left_s = [], now_s
    for part_s in (max(0.0, now_s - age_s) + queue_s, *others):
        cut.append(min(part_s, left_s))
        left_s -= cut[-1]
    return tuple(cut)


def record_of(scope: Scope) -> RequestRecord:
    """Return the record of this scope's request, or an unused one if it is no image request."""
    record = scope.get("state", {}).get("record")
    return record if isinstance(record, RequestRecord) else RequestRecord(request_id(scope))


def request_id(scope: Scope) -> str:
    """Return the id that Serve's proxy set: the client's own if it sent one."""
    return Headers(scope=scope).get("x-request-id", "none")[:200]


@dataclass(frozen=True)
class _Measured:
    """The durations of one model's requests."""

    request: Histogram
    first_partial: Histogram
    parts: Mapping[str, Histogram]

    @classmethod
    def of(cls, model: str) -> "_Measured":
        parts = {part: REQUEST_PART.labels(model, part) for part in PARTS}
        return cls(REQUEST.labels(model), FIRST_PARTIAL.labels(model), parts)


class RequestLog:
    """ASGI middleware that keeps a `RequestRecord` of each image request until its last byte."""

    def __init__(
        self,
        app: ASGIApp,
        models: Sequence[str],
        paths: Collection[str],
        log_prompts: bool = False,
        principals: Iterable[tuple[str, Priority]] = (),
    ) -> None:
        """Set up the metrics.

        Args:
            app: the next ASGI application.
            models: names of the models, for the metrics' label. A request counts for the first
                one until its own is known.
            paths: paths of image requests, as routes have them.
            log_prompts: write prompts to the log.
            principals: names and priorities of the keys that are known now.
        """
        self._app = app
        self._models = tuple(models)
        self._paths = frozenset(paths)
        self._log_prompts = log_prompts
        self._measured = {model: _Measured.of(model) for model in models}
        self._open: set[RequestRecord] = set()
        for model, priority in itertools.product(models, get_args(Priority)):
            count = functools.partial(self._count_open, model, priority)
            OPEN_REQUESTS.labels(model, priority).set_function(count)
        self._known: set[tuple[str, Priority]] = set()
        for principal, priority in [(NOBODY, RequestRecord.priority), *principals]:
            self._expect(principal, priority)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] != "http"
            or scope["method"] != "POST"
            or get_route_path(scope) not in self._paths
        ):
            await self._app(scope, receive, send)
            return
        record = RequestRecord(request_id(scope), model=self._models[0])
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

    def _count_open(self, model: str, priority: Priority) -> float:
        return sum(
            (record.model, record.priority) == (model, priority) for record in tuple(self._open)
        )

    def _expect(self, principal: str, priority: Priority) -> None:
        """Create a principal's counters at 0.

        To Prometheus, a counter that first appears with a failure has not risen. Each key has 18
        series for each model, 2 kB of each gateway replica's report: 50 keys and 4 replicas make
        0.4 MB a model.
        """
        if (principal, priority) not in self._known:
            self._known.add((principal, priority))
            for model, outcome in itertools.product(self._models, OUTCOMES):
                REQUESTS.labels(model, principal, priority, outcome)

    def _count(self, record: RequestRecord) -> None:
        self._expect(record.principal, record.priority)  # a key that was added later
        REQUESTS.labels(record.model, record.principal, record.priority, record.outcome).inc()
        measured = self._measured[record.model]
        plain = _EXEMPLAR.fullmatch(record.request_id)
        exemplar = {"request_id": record.request_id} if plain else None
        if record.first_partial_s is not None:
            measured.first_partial.observe(record.first_partial_s, exemplar)
        if record.outcome == "completed" and record.timings is not None:
            timings = record.timings.until(record.age_s)
            measured.request.observe(timings.total_s, exemplar)
            for part, seconds in timings.parts().items():
                measured.parts[part].observe(seconds, exemplar)

    def _log(self, record: RequestRecord) -> None:
        """Log the request as text, and as fields for JSON logs. Prompts are left out by default."""
        fields: dict[str, str | int | float] = {
            "request_id": record.request_id,
            "key": record.principal,
            "priority": record.priority,
            "outcome": record.outcome,
        }
        if len(self._models) > 1:
            fields["model"] = record.model
        end_user = ""
        if record.end_user is not None:
            fields["safety_identifier"] = record.end_user
            end_user = f" for {record.end_user!r}"
        what = ""
        if record.images:
            first, count = record.images[0], len(record.images)
            fields |= {
                "size": f"{first.width}x{first.height}",
                "steps": first.steps_to_run,
                "seed": first.seed,
                "images": count,
            }
            many = f"{count} images, " if count > 1 else ""
            several = f" {record.model}," if len(self._models) > 1 else ""
            what = several + " {size}, {steps} steps, {many}seed {seed}:".format(
                **fields, many=many
            )
        if record.traceparent:
            fields["trace_id"] = record.traceparent.split("-")[1]
        age_s = record.age_s
        fields["total_s"] = round(age_s, 4)
        parts = ""
        if record.completed and record.timings is not None:
            spent = record.timings.until(age_s).parts()
            fields |= {f"{part}_s": round(seconds, 4) for part, seconds in spent.items()}
            parts = ", ".join(f"{part} {seconds:.3f}" for part, seconds in spent.items())
            parts = f" ({parts})"
        backends = ", ".join(f"{replica}/{n}" for replica, n in record.engine_requests.values())
        if backends:
            fields["engine_request"] = backends
        if self._log_prompts and record.images:
            fields["prompt"] = record.images[0].prompt
        logger.info(
            "request %s of %s%s:%s %s after %.3f s%s%s%s",
            record.request_id,
            record.principal,
            end_user,
            what,
            record.outcome,
            age_s,
            parts,
            f" as {backends}" if backends else "",
            f": {fields['prompt']!r}" if "prompt" in fields else "",
            extra=fields,
        )
