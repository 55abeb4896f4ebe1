"""Labels and the closed sets of their values."""

from collections.abc import Iterator

from serve_app.errors import ConfigError, DiffusionServeError, Overloaded

SIDES_PX = (64, 128, 256, 512, 768, 1024, 1536, 2048)

SIZES = (*map(str, SIDES_PX), "larger")
"""Values of the label ``size``."""


def size_label(width: int, height: int) -> str:
    """Return the side of the smallest square of `SIDES_PX` with at least as many pixels.

    "1024" stands for up to 1024² pixels. Requests may name any size, so that the sizes themselves
    would make an unlimited number of series.
    """
    for side in SIDES_PX:
        if width * height <= side * side:
            return str(side)
    return SIZES[-1]


def _request_errors(kind: type[DiffusionServeError]) -> Iterator[type[DiffusionServeError]]:
    """Yield ``kind`` and its subclasses, without those that only occur at start."""
    if not issubclass(kind, ConfigError):
        yield kind
        for below in kind.__subclasses__():
            yield from _request_errors(below)


_ERRORS = tuple(_request_errors(DiffusionServeError))

OUTCOMES = tuple(dict.fromkeys(("completed", "http_error", *(error.code for error in _ERRORS))))
"""Values of the label ``outcome`` of a request: completed, or the code of the client's error."""

UNSERVED = tuple(
    dict.fromkeys(
        error.code for error in _ERRORS if error.status >= 500 or issubclass(error, Overloaded)
    )
)
"""Outcomes of valid requests that the server failed to serve."""

LABELS = {
    "model": "`id` of the model in the config",
    "replica": "Serve's name of the replica that measured it",
    "key": "names of API keys; `anonymous` if no key is required, `none` if no known key was sent",
    "outcome": "`completed` or the error code; `met` or `missed` for deadlines",
    "part": "`queue`, `encode`, `denoise`, `decode`, `response`; they add up to the total",
    "size": "side of the smallest square with at least as many pixels: " + ", ".join(SIZES),
    "state": "for requests `queued`, `parked`, `running`; for replicas `starting`, `updating`, "
    "`recovering`, `running`, `stopping`, `pending_migration`",
    "priority": "priority of the key: `interactive` or `batch`; `interactive` without a key",
    "reason": "`deadline`, `backlog`: an engine's; `queue`: Serve's queue for the replicas is full",
    "set_by": "`client`: the request has a deadline; `server`: from `engine.slo_scale`",
    "activity": "network that ran: `denoise`, `encode`, `decode`",
    "kind": "`used`, `reserved`: by torch; `free`, `total`: of the device",
    "phase": "phase of a start: `load`, `certify`, `preview`, `schedulers`, `measure`, `compile`",
    "diffusion_serve_sharing": "mode: `batched`, `interleaved`, `sequential`; the metric is 1 "
    "for the mode in use",
    "deployment": "`Generator`, or `Generator-<id>` with `models`; `Gateway`",
    "answer": "`answered`: in this response; `silent`: running, and did not report",
    "version": "version of diffusion-serve",
    "node": "host name of the machine; in Kubernetes, that of the pod",
    "device": "such as `cpu` or `cuda`",
    "gpu": "UUID of the GPU, as in NVIDIA's tools",
    "result": "of a load: `loaded`; `not_found`; `invalid`: the file cannot be used; `failed`",
    "application": "Serve's name of the application",
    "term": "deciding term: `min`, `blind`, `hold`, `batch`, `arrivals`, `backlog`, `max`",
    "by": "`arrivals`: arriving work; `backlog`: waiting work",
}
"""The source of each label's values."""
