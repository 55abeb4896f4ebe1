"""Every metric, declared once: name, help, labels, buckets.

Units are in the names: seconds, bytes, or none for counts. The values of every label come from a
closed set, as `LABELS` says, so that no request can make a new series. `ENGINE` holds what a
replica of the generator measures, `GATEWAY` what one of the gateway does, `APPLICATION` what the
gateway that answers ``GET /metrics`` says of all of them. They are in no default registry: an
engine in somebody's program is not to add to what that exports.

``python -m serve_app.metrics`` prints the table for the README.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Enum,
    Gauge,
    Histogram,
    Info,
    Metric,
    ProcessCollector,
)
from prometheus_client.metrics import MetricWrapperBase

from serve_app.errors import ConfigError, DiffusionServeError, Overloaded

ENGINE = CollectorRegistry()
GATEWAY = CollectorRegistry()
APPLICATION = CollectorRegistry()

for _registry in (ENGINE, GATEWAY):  # process_*: memory, processor time, open files
    ProcessCollector(registry=_registry)

SIDES_PX = (64, 128, 256, 512, 768, 1024, 1536, 2048)

SIZES = (*map(str, SIDES_PX), "larger")
"""Values of the label ``size``."""


def size_label(width: int, height: int) -> str:
    """The side of the smallest square of `SIDES_PX` that has as many pixels: "1024" is up to 1024².

    Requests may name any size, so that sizes themselves would be series without end.
    """
    for side in SIDES_PX:
        if width * height <= side * side:
            return str(side)
    return SIZES[-1]


def _errors(kind: type[DiffusionServeError]) -> Iterator[type[DiffusionServeError]]:
    """That a request can meet."""
    if not issubclass(kind, ConfigError):  # raised at start
        yield kind
        for below in kind.__subclasses__():
            yield from _errors(below)


ERRORS = tuple(_errors(DiffusionServeError))

OUTCOMES = tuple(dict.fromkeys(("completed", "http_error", *(error.code for error in ERRORS))))
"""Values of the label ``outcome`` of a request: done, or the code of what the client was told."""

UNSERVED = tuple(
    error.code for error in ERRORS if error.status >= 500 or issubclass(error, Overloaded)
)
"""Those of requests that were right, and whose picture the server owes."""

LABELS = {
    "model": "`model.id` of the config",
    "replica": "Serve's name of the replica that measured it",
    "key": "names of API keys; `anonymous` where none is asked for, `none` where none is known",
    "outcome": "`completed` or the error code; `met` or `missed` of deadlines",
    "part": "`queue`, `encode`, `denoise`, `decode`, `response`; they add up to the whole",
    "size": f"pixels, as the side of a square that has as many: {', '.join(SIZES)}",
    "state": "of requests `queued`, `parked`, `running`; of replicas `starting`, `updating`, "
    "`recovering`, `running`, `stopping`, `pending_migration`",
    "priority": "`interactive`, `batch`: the key's; without one `interactive`",
    "reason": "`deadline`, `backlog`: of an engine; `queue`: Serve's before the replicas is full",
    "set_by": "`client`: the request named it; `server`: from `engine.slo_scale`",
    "activity": "`denoise`, `encode`, `decode`",
    "kind": "`used`, `reserved`: by torch; `free`, `total`: of the device",
    "phase": "`load`, `certify`, `preview`, `measure`, `compile`",
    "diffusion_serve_sharing": "`batched`, `interleaved`, `alone`",
    "deployment": "Serve's name of the deployment",
    "answer": "`answered`, `silent`",
    "version": "of diffusion-serve",
    "node": "the machine's host name: in Kubernetes the pod's",
    "device": "such as `cpu` or `cuda`",
    "gpu": "UUID of the GPU as NVIDIA's tools have it",
    "application": "Serve's name of the application",
    "term": "what decided: `autoscaling/policy.py` names them",
    "by": "`arrivals`, `backlog`",
}
"""Where the values of each label come from."""

WAITS_S = (0.1, 0.25, 0.5, 1.0, 1.5, 2.5, 4.0, 6.0, 10.0, 15.0, 25.0, 40.0, 60.0, 120.0, 300.0)
"""Of what a client waits for."""

PARTS_S = (0.01, 0.03, *WAITS_S)

STEPS_S = (0.003, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)

# ---- the gateway: requests as clients see them ---------------------------------------------------

REQUESTS = Counter(
    "diffusion_serve_requests_total",
    "HTTP requests for pictures that have ended.",
    ["model", "key", "priority", "outcome"],
    registry=GATEWAY,
)

OPEN_REQUESTS = Gauge(
    "diffusion_serve_open_requests",
    "HTTP requests for pictures that have come and not ended, wherever they wait.",
    ["model", "priority"],
    registry=GATEWAY,
)

REQUEST = Histogram(
    "diffusion_serve_request_seconds",
    "From the arrival of a request for pictures at the gateway to the last byte of its answer, if "
    "completed.",
    ["model"],
    buckets=WAITS_S,
    registry=GATEWAY,
)

REQUEST_PART = Histogram(
    "diffusion_serve_request_part_seconds",
    "Where the time of a completed request went; the parts add up to the whole.",
    ["model", "part"],
    buckets=PARTS_S,
    registry=GATEWAY,
)

FIRST_PARTIAL = Histogram(
    "diffusion_serve_first_partial_seconds",
    "From the arrival of a request to its first preview.",
    ["model"],
    buckets=WAITS_S,
    registry=GATEWAY,
)

HELD = Gauge(
    "diffusion_serve_held_requests",
    "Requests that wait in this gateway replica for a replica that is starting, refused by others.",
    registry=GATEWAY,
)

GATEWAY_INFO = Info(
    "diffusion_serve_gateway",
    "Where a replica of the gateway runs.",
    ["model", "version", "node"],
    registry=GATEWAY,
)

# ---- the engine: one for each replica of the generator -------------------------------------------

ENGINE_REQUESTS = Gauge(
    "diffusion_serve_engine_requests",
    "Requests in the engine: queued for a place, parked between two calls, or running in one.",
    ["model", "state"],
    registry=ENGINE,
)

BACKLOG = Gauge(
    "diffusion_serve_backlog_seconds",
    "Predicted seconds to finish all accepted work of a class.",
    ["model", "priority"],
    registry=ENGINE,
)

ARRIVING = Gauge(
    "diffusion_serve_arriving_work_ratio",
    "Seconds of interactive work, each request alone, offered a second, over the last 30 s.",
    ["model"],
    registry=ENGINE,
)

THROUGHPUT = Gauge(
    "diffusion_serve_throughput_ratio",
    "Seconds of work, each request alone, done in a busy second; over 1 by batching.",
    ["model"],
    registry=ENGINE,
)

UTILIZATION = Gauge(
    "diffusion_serve_utilization_ratio",
    "Share of the last 30 s in which there was interactive work.",
    ["model"],
    registry=ENGINE,
)

REJECTIONS = Counter(
    "diffusion_serve_refusals_total",
    "Pictures that were not taken in, by the limit that they would have broken.",
    ["model", "reason"],
    registry=ENGINE,
)
GATEWAY.register(REJECTIONS)  # which says of those that came to no engine

FORECAST_ERROR = Histogram(
    "diffusion_serve_forecast_error_ratio",
    "By how much the predicted time of a finished request was off, as a share of the time it took.",
    ["model"],
    buckets=(0.02, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0),
    registry=ENGINE,
)

DEADLINES = Counter(
    "diffusion_serve_deadlines_total",
    "Interactive pictures that were painted, by whether they were done in time.",
    ["model", "outcome", "set_by"],
    registry=ENGINE,
)

CANCELLATION = Histogram(
    "diffusion_serve_cancellation_seconds",
    "From the word that nobody wants a picture any more until its place was free.",
    ["model"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    registry=ENGINE,
)

STEPS = Counter(
    "diffusion_serve_steps_total",
    "Denoiser calls of single pictures: a call for a batch of four counts four.",
    ["model", "size"],
    registry=ENGINE,
)

STEP = Histogram(
    "diffusion_serve_step_seconds",
    "Time on the device of one denoiser call, for a batch of whatever size.",
    ["model", "size"],
    buckets=STEPS_S,
    registry=ENGINE,
)

BATCH_SIZE = Histogram(
    "diffusion_serve_batch_size",
    "Pictures in one denoiser call.",
    ["model"],
    buckets=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64),
    registry=ENGINE,
)

DEVICE = Counter(
    "diffusion_serve_device_seconds_total",
    "What the device spent its time on, of the calls of networks.",
    ["model", "activity"],
    registry=ENGINE,
)

STALL = Histogram(
    "diffusion_serve_engine_stall_seconds",
    "Between two network calls while requests were there, where it was over 0.1 s.",
    ["model"],
    buckets=(0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
    registry=ENGINE,
)

IMAGES = Counter(
    "diffusion_serve_images_total",
    "Pictures painted.",
    ["model", "size"],
    registry=ENGINE,
)

PIXELS = Counter(
    "diffusion_serve_pixels_total",
    "Pixels of the pictures painted.",
    ["model"],
    registry=ENGINE,
)

PREVIEWS = Counter(
    "diffusion_serve_previews_total",
    "Previews made.",
    ["model"],
    registry=ENGINE,
)

LORA_SWITCHES = Counter(
    "diffusion_serve_lora_switches_total",
    "Changes of the LoRA adapters that act, between two calls.",
    ["model"],
    registry=ENGINE,
)

OUT_OF_MEMORY = Counter(
    "diffusion_serve_out_of_memory_total",
    "Network calls that found too little device memory; most are tried again.",
    ["model"],
    registry=ENGINE,
)

DEVICE_MEMORY = Gauge(
    "diffusion_serve_device_memory_bytes",
    "Memory of the GPU.",
    ["model", "kind"],
    registry=ENGINE,
)

SHARING = Enum(
    "diffusion_serve_sharing",
    "How requests share the pipeline, as far as pictures came out the same at start-up; none where "
    "`max_running` is 1.",
    ["model"],
    states=["batched", "interleaved", "alone"],
    registry=ENGINE,
)

SHARING_DIFFERENCE = Gauge(
    "diffusion_serve_sharing_difference",
    "Largest difference of a pixel in [0, 1] between batched and alone at start-up.",
    ["model"],
    registry=ENGINE,
)

COLD_START = Gauge(
    "diffusion_serve_cold_start_seconds",
    "How long the last start of the engine took, by phase; the phases add up to the whole.",
    ["model", "phase"],
    registry=ENGINE,
)

ENGINE_INFO = Info(
    "diffusion_serve_engine",
    "Where a replica of the generator runs.",
    ["model", "version", "node", "device", "gpu"],
    registry=ENGINE,
)

# ---- the application as the gateway that answers knows it ----------------------------------------

REPLICAS = Gauge(
    "diffusion_serve_replicas",
    "Replicas of the generator by their state, as Serve's controller says.",
    ["model", "state"],
    registry=APPLICATION,
)

TARGET_REPLICAS = Gauge(
    "diffusion_serve_target_replicas",
    "Replicas of the generator that Serve's controller wants.",
    ["model"],
    registry=APPLICATION,
)

SCRAPED = Gauge(
    "diffusion_serve_scraped_replicas",
    "Replicas whose figures are in this answer, and running ones that did not say theirs in time.",
    ["model", "deployment", "answer"],
    registry=APPLICATION,
)

SCRAPE = Gauge(
    "diffusion_serve_scrape_seconds",
    "How long it took to ask the replicas for this answer.",
    ["model"],
    registry=APPLICATION,
)


# ---- on Ray's port -------------------------------------------------------------------------------


@dataclass(frozen=True)
class RayGauge:
    """A gauge that Ray exports, its name with ``ray_`` before it."""

    name: str
    documentation: str
    labels: tuple[str, ...] = ("application", "deployment")


WANTED_REPLICAS = RayGauge(
    "diffusion_serve_autoscaling_wanted_replicas", "Replicas that the policy wants."
)
NEEDED_REPLICAS = RayGauge(
    "diffusion_serve_autoscaling_needed_replicas",
    "Replicas that arriving work needs, or waiting work, before a surplus is held.",
    ("application", "deployment", "by"),
)
DECISIVE_TERM = RayGauge(
    "diffusion_serve_autoscaling_term",
    "1 for what the decision came from.",
    ("application", "deployment", "term"),
)
FORECAST_REPLICAS = RayGauge(
    "diffusion_serve_autoscaling_forecast_replicas",
    "Replicas that will be kept busy when one asked for now is there.",
)
WAITING = RayGauge(
    "diffusion_serve_autoscaling_waiting_seconds", "Work that waits, of one replica."
)
MEASURED_COLD_START = RayGauge(
    "diffusion_serve_autoscaling_cold_start_seconds",
    "From asking for a replica until it paints: measured or configured, more while one is overdue.",
)

RAY_GAUGES = (
    WANTED_REPLICAS,
    NEEDED_REPLICAS,
    DECISIVE_TERM,
    FORECAST_REPLICAS,
    WAITING,
    MEASURED_COLD_START,
)
"""The decisions of the autoscaling policy: Serve's controller, where it runs, has no other port."""


# ---- what replicas report ------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """The figures of one replica, as they travel to the gateway that was asked."""

    replica: str | None
    """None of what is said of all."""
    families: list[Metric]


Whose = Literal["engine", "gateway", "application"]
"""Names, for what Serve takes apart and sends away cannot hold a registry."""


def report(whose: Whose, replica: str | None) -> Report:
    """How it is now. Without when each series began: as many lines again, and nobody reads them."""
    registries = {"engine": ENGINE, "gateway": GATEWAY, "application": APPLICATION}
    families = []
    for family in registries[whose].collect():
        family.samples = [one for one in family.samples if not one.name.endswith("_created")]
        families.append(family)
    return Report(replica, families)


# ---- the table -----------------------------------------------------------------------------------


def declared() -> list[MetricWrapperBase]:
    """All but Ray's, in the order in which they stand here."""
    return [one for one in globals().values() if isinstance(one, MetricWrapperBase)]


def _row(name: str, kind: str, labels: Sequence[str], documentation: str) -> str:
    words = ", ".join(f"`{label}`" for label in labels)
    return f"| `{name}` | {kind} | {words} | {documentation} |"


def table() -> str:
    """In Markdown: every metric, and where the values of every label come from."""
    rows = ["| metric | kind | labels | what it is |", "| --- | --- | --- | --- |"]
    shared = tuple(APPLICATION.collect())
    for metric in declared():
        [family] = metric.describe()
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        kind = "gauge" if family.type in ("info", "stateset") else family.type
        labels = list(metric._labelnames)
        if family.type == "stateset":
            labels.append(family.name)
        if all(family.name != one.name for one in shared):
            labels.append("replica")
        rows.append(_row(family.name + suffix, kind, labels, family.documentation))
    rows += [
        _row(f"ray_{gauge.name}", "gauge", gauge.labels, gauge.documentation)
        for gauge in RAY_GAUGES
    ]
    rows += ["", "| label | values |", "| --- | --- |"]
    rows += [f"| `{label}` | {values} |" for label, values in LABELS.items()]
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())  # noqa: T201  what it is run for
