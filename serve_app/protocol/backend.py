"""The interface between the gateway and the generator."""

from collections.abc import AsyncGenerator
from typing import Literal, Protocol

from serve_app.protocol.events import Progress, Queued, Timeline
from serve_app.protocol.images import EncodedImage, Encoding, PartialImage
from serve_app.protocol.loras import LoraStatus
from serve_app.protocol.params import INITIAL, GenerationParams, ModelInfo, RequestContext

ModelState = Literal["running", "starting", "at_zero", "failed", "unknown"]
"""State of a model's replicas together: ``running`` if one runs, ``failed`` if none runs and the
last start failed, ``at_zero`` if there is none because no request needs one, ``unknown`` until
Serve's controller has reported them once."""

GenerationEvent = Queued | Progress | PartialImage | Timeline | EncodedImage


class GenerationBackend(Protocol):
    """Generates images, in this process or another one."""

    def generate(
        self,
        params: GenerationParams,
        encoding: Encoding,
        progress: bool = False,
        context: RequestContext = INITIAL,
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Generate one image, which is the last event.

        `Queued` comes when the request is admitted. `Progress` comes only with ``progress``, and
        `Timeline` only if the request is traced. Closing the generator, or cancelling the task that
        waits for an event, cancels the request. Waiting for a replica to start has a time limit of
        its own.

        Raises:
            Overloaded: in place of the first event, if the request is rejected.
            DeadlineExceeded: if it takes longer than the server allows.
            DiffusionServeError: if it fails otherwise.
        """
        ...

    async def describe(self, deadline_s: float | None = None) -> ModelInfo:
        """Describe the model, for a request with this deadline.

        Raises:
            Unavailable: if the first replica is not ready in time.
        """
        ...

    async def check_ready(self) -> None:
        """Raise `Unavailable` unless a replica can generate now."""
        ...

    async def state(self) -> ModelState:
        """Return the state of the replicas, without starting or waiting for one."""
        ...

    async def loras(self) -> tuple[LoraStatus, ...]:
        """List the LoRA adapters, as the running replicas know them, without starting one.

        Raises:
            LoraSourceAway: replicas run, and none could list them.
        """
        ...

    @property
    def known(self) -> ModelInfo | None:
        """The description of the model, if a replica has given it yet."""
        ...
