"""One request inside the engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile

from torch import Tensor

from serve_app.engine.batching.batch import MergeableCall
from serve_app.engine.batching.rendezvous import Call, Job
from serve_app.engine.scheduling.cost import Size
from serve_app.engine.scheduling.policies import QueueEntry
from serve_app.protocol.events import MAX_PEERS, Event, Step, Timeline
from serve_app.protocol.params import GenerationParams, RequestContext

EventCallback = Callable[[Event], None]
"""Called on the engine's thread: must be quick and must not raise."""


@dataclass(eq=False)
class Request:
    """One request inside the engine. Only the engine's thread touches it after submission."""

    number: int
    params: GenerationParams
    context: RequestContext
    on_event: EventCallback
    submitted_at: float
    """When it came here."""
    entry: QueueEntry
    waited_s: float = 0.0
    """On its way here, by the clocks of two machines: for its deadline, and nothing else."""
    accepted_at: float = 0.0
    predicted_s: float = 0.0
    """From then to its end, as it looked then."""
    started_at: float = 0.0
    encoded_at: float = 0.0
    """When it came to its first denoiser call."""
    denoised_at: float = 0.0
    """When its last denoiser call so far was done."""
    steps_done: int = 0
    steps_total: int = 0
    calls: int = 0
    encode_s: float = 0.0
    """Spent on it before its first denoiser call."""
    non_denoiser_s: float = 0.0
    """Spent on it outside the denoiser since its last denoiser call."""
    job: Job[Tensor] | None = None
    rows: float = 1.0
    """Of its denoiser calls, relative to one picture with guidance."""
    prompt_tokens: int = 0
    warnings: tuple[str, ...] = ()
    mergeable: MergeableCall | None = None
    """The parked call, if it may share a forward with others."""
    steps: list[Step] = field(default_factory=list)
    """Those that are done, if it is traced."""
    peers: dict[str, None] = field(default_factory=dict)
    """Traces of those that shared its calls, its own among them; an ordered set."""

    @property
    def call(self) -> Call:
        """The call at which it is parked, as every request that runs is between two calls."""
        assert self.job is not None
        assert self.job.call is not None
        return self.job.call

    @property
    def size(self) -> Size:
        assert self.params.width is not None
        assert self.params.height is not None
        return self.params.width, self.params.height

    @property
    def steps_left(self) -> int:
        # The pipeline says how many it really runs, once it does.
        return max(0, (self.steps_total or self.params.steps_to_run) - self.steps_done)

    @property
    def timeline(self) -> Timeline:
        """Up to now. How long a picture was decoded says its result."""
        marks = [self.submitted_at, self.started_at, self.encoded_at]
        if self.calls and not self.steps_left:
            marks.append(self.denoised_at)
        others = [trace for trace in self.peers if trace != self.context.trace]
        return Timeline(
            tuple(end - start for start, end in pairwise(takewhile(bool, marks))),
            tuple(self.steps),
            tuple(others[:MAX_PEERS]),
        )


def link_batch_peers(batch: Sequence[Request]) -> None:
    """Those who shared a denoiser call, to each other."""
    traces = {one.context.trace: None for one in batch if one.context.trace}
    if not traces:
        return
    for request in batch:
        if request.context.trace and len(request.peers) <= MAX_PEERS:
            request.peers |= traces
