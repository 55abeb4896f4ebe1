"""What the gateway needs of whoever paints."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

from serve_app.engine.encoding import EncodedImage, Encoding, PartialImage
from serve_app.engine.events import Progress, Queued, Timeline
from serve_app.engine.params import FRESH, GenerationParams, ModelInfo, Standing
from serve_app.errors import DeadlineExceeded

PainterEvent = Queued | Progress | PartialImage | Timeline | EncodedImage


class Painter(Protocol):
    """The generator, wherever that runs."""

    def paint(
        self,
        params: GenerationParams,
        encoding: Encoding,
        progress: bool = False,
        standing: Standing = FRESH,
    ) -> AsyncGenerator[PainterEvent, None]:
        """One picture, the last event. Raises `DiffusionServeError`.

        `Queued` comes when it was accepted, and `Overloaded` is raised instead if it was not;
        `Progress` comes only if asked for, and `Timeline` only if it is traced. Closing it, or
        cancelling whoever waits for an event, cancels the work behind it.
        """
        ...

    async def describe(self) -> ModelInfo:
        """What the model can do. Raises `Unavailable` if the first replica is not ready in time."""
        ...

    async def check_ready(self) -> None:
        """Raise `Unavailable` unless a replica can paint now."""
        ...


async def within(
    events: AsyncGenerator[PainterEvent, None], seconds: float
) -> AsyncGenerator[PainterEvent, None]:
    """The same events, and `DeadlineExceeded` when the last has not come in time."""
    end_at = asyncio.get_running_loop().time() + seconds
    async with aclosing(events):
        while True:
            try:
                async with asyncio.timeout_at(end_at):
                    event = await anext(events)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise DeadlineExceeded(
                    f"the picture was not done within {seconds:g} s, and was given up."
                ) from None
            yield event
