"""What the gateway needs of whoever paints."""

from collections.abc import AsyncGenerator
from typing import Protocol

from serve_app.protocol.events import Progress, Queued, Timeline
from serve_app.protocol.images import EncodedImage, Encoding, PartialImage
from serve_app.protocol.params import INITIAL, GenerationParams, ModelInfo, RequestContext

GenerationEvent = Queued | Progress | PartialImage | Timeline | EncodedImage


class GenerationBackend(Protocol):
    """The generator, wherever that runs."""

    def paint(
        self,
        params: GenerationParams,
        encoding: Encoding,
        progress: bool = False,
        context: RequestContext = INITIAL,
    ) -> AsyncGenerator[GenerationEvent, None]:
        """One picture, the last event. Raises `DiffusionServeError`.

        `Queued` comes when it was accepted, and `Overloaded` is raised instead if it was not;
        `Progress` comes only if asked for, and `Timeline` only if it is traced. What is not done in
        the longest time that the server allows is given up; waiting for a replica to start is not
        part of that, and has a limit of its own. Closing it, or cancelling whoever waits for an
        event, cancels the work behind it.
        """
        ...

    async def describe(self, deadline_s: float | None = None) -> ModelInfo:
        """What the model can do, for a request with such a deadline.

        Raises `Unavailable` if the first replica is not ready in time.
        """
        ...

    async def check_ready(self) -> None:
        """Raise `Unavailable` unless a replica can paint now."""
        ...
