"""One request inside the engine."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING

from torch import Tensor

from serve_app.engine.batching.batch import MergeableCall
from serve_app.engine.batching.extrapolation import Extrapolator
from serve_app.engine.batching.rendezvous import Call, Job
from serve_app.engine.model.finite import FiniteCheck
from serve_app.engine.receivers import EventCallback
from serve_app.engine.scheduling.cost import Size
from serve_app.engine.scheduling.queue import QueueEntry
from serve_app.protocol.events import MAX_PEERS, Step, Timeline
from serve_app.protocol.params import GenerationParams, RequestContext
from serve_app.protocol.safety import SafetyVerdict

if TYPE_CHECKING:  # its package counts loads in the metrics of requests
    from serve_app.engine.loras.source import AdapterFile


@dataclass(eq=False)
class Request:
    """One request inside the engine. Only the engine's thread touches it after submission."""

    number: int
    params: GenerationParams
    context: RequestContext
    on_event: EventCallback
    submitted_at: float
    """Arrival at this engine, by `time.perf_counter`, as all times here."""
    waited_s: float = 0.0
    """Seconds on its way here, by the clocks of two machines. Only its deadline uses them."""
    lora_files: "tuple[AdapterFile, ...]" = ()
    """Files of its adapters on demand."""
    entry: QueueEntry = field(init=False)
    """The request as the scheduling policies see it. Admission sets its deadline and its work."""
    accepted_at: float = 0.0
    predicted_s: float = 0.0
    """Seconds from its admission to its completion, as predicted then."""
    started_at: float = 0.0
    encoded_at: float = 0.0
    """Time at which it reached its first denoiser call."""
    denoised_at: float = 0.0
    """End of its last denoiser call so far."""
    steps_done: int = 0
    steps_total: int = 0
    calls: int = 0
    """Denoiser calls that were made."""
    encode_s: float = 0.0
    """Seconds spent on it before its first denoiser call."""
    non_denoiser_s: float = 0.0
    """Seconds spent on it outside the denoiser since its last denoiser call."""
    extrapolator: Extrapolator | None = None
    """Answers some of its denoiser calls, while it runs."""
    extrapolated: int = 0
    """Denoiser calls that were answered without the denoiser, once it has ended."""
    job: Job[Tensor] | None = None
    check: FiniteCheck | None = None
    """Check of its image, once the pipeline has returned it."""
    rows: float = 1.0
    """Batch rows of its denoiser calls, relative to one image with guidance."""
    prompt_tokens: int = 0
    warnings: tuple[str, ...] = ()
    safety: SafetyVerdict | None = None
    mergeable: MergeableCall | None = None
    """The parked call, if it may share a denoiser call with others."""
    steps: list[Step] = field(default_factory=list)
    """Steps that are done, of a traced request."""
    peers: dict[str, None] = field(default_factory=dict)
    """Traces of its batch peers and its own; an ordered set."""

    def __post_init__(self) -> None:
        low_priority = self.params.priority == "batch"
        self.entry = QueueEntry(
            self.number,
            self.submitted_at,
            remaining_s=0.0,
            arrived_at=self.submitted_at,
            low_priority=low_priority,
        )

    @property
    def call(self) -> Call:
        """The call at which it is parked. Every running request is parked between two steps."""
        assert self.job is not None
        assert self.job.call is not None
        return self.job.call

    @property
    def size(self) -> Size:
        assert self.params.width is not None
        assert self.params.height is not None
        return self.params.width, self.params.height

    @property
    def work(self) -> Size:
        """The size by which its costs are known: `work_of` its parameters."""
        return work_of(self.params)

    @property
    def steps_left(self) -> int:
        # The pipeline reports how many steps it really runs after the first one.
        return max(0, (self.steps_total or self.params.steps_to_run) - self.steps_done)

    @property
    def timeline(self) -> Timeline:
        """Progress until now. The decoding time is in the result."""
        marks = [self.submitted_at, self.started_at, self.encoded_at]
        if self.calls and not self.steps_left:
            marks.append(self.denoised_at)
        others = [trace for trace in self.peers if trace != self.context.trace]
        return Timeline(
            tuple(end - start for start, end in pairwise(takewhile(bool, marks))),
            tuple(self.steps),
            tuple(others[:MAX_PEERS]),
        )


def work_of(params: GenerationParams) -> Size:
    """Return the size of an image with as many pixels as the network sees in a step.

    A pipeline without a strength passes whole input images to the network in each step. They count
    as large as the image, so requests with as many of them are learned together. With a strength,
    an input image only begins the latents.
    """
    assert params.width is not None
    assert params.height is not None
    whole = params.image is not None and params.strength is None
    images = 1 + len(params.more_images) if whole else 0
    return params.width, params.height * (1 + images)


def link_batch_peers(batch: Sequence[Request]) -> None:
    """Note the traces of requests that shared a denoiser call in each other."""
    traces = {one.context.trace: None for one in batch if one.context.trace}
    if not traces:
        return
    for request in batch:
        if request.context.trace and len(request.peers) <= MAX_PEERS:
            request.peers |= traces
