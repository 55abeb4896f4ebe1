"""One request inside the engine."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from serve_app.engine.batch import MergeableCall
from serve_app.engine.cost import Size
from serve_app.engine.events import Event
from serve_app.engine.params import GenerationParams, Standing
from serve_app.engine.rendezvous import Call, Job
from serve_app.engine.scheduler import Task

EventCallback = Callable[[Event], None]
"""Called on the engine's thread: must be quick and must not raise."""


@dataclass(eq=False)
class Request:
    """One request inside the engine. Only the engine's thread touches it after submission."""

    number: int
    params: GenerationParams
    standing: Standing
    on_event: EventCallback
    submitted_at: float
    """When it was sent: before it came here, if it was held on its way."""
    task: Task
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
    apart_s: float = 0.0
    """Spent on it outside the denoiser since its last denoiser call."""
    job: Job[Tensor] | None = None
    rows: float = 1.0
    """Of its denoiser calls, relative to one picture with guidance."""
    prompt_tokens: int = 0
    warnings: tuple[str, ...] = ()
    mergeable: MergeableCall | None = None
    """The parked call, if it may share a forward with others."""

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
