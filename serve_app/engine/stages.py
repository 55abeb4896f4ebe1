"""Stages: calls of encoders and VAE blocks, which run between denoiser calls. Torch-free."""

import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from serve_app.engine.scheduling.cost import CostModel
from serve_app.engine.scheduling.queue import QueueEntry

if TYPE_CHECKING:  # a request holds tensors
    from serve_app.engine.request import Request


class StageQueue:
    """Requests that are parked at a stage.

    Stages before the first denoiser call go first: the sooner they run, the larger the batches.
    Of the stages that decode, one follows each denoiser call, and more as long as they take no
    longer than that call. So the step of another request waits for one denoiser call or one block
    of a decoder, and for nothing longer. A request that has begun to decode finishes before the
    next one begins, because half a decoding holds much memory.
    """

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._parked: list[Request] = []
        self._decoding_s = 0.0  # predicted, since the last denoiser call
        self._call_s = 0.0  # predicted, of that call

    def __bool__(self) -> bool:
        return bool(self._parked)

    def park(self, request: "Request") -> None:
        self._parked.append(request)

    def discard(self, request: "Request") -> None:
        if request in self._parked:
            self._parked.remove(request)

    def denoiser_called(self, predicted_s: float) -> None:
        """Allow as many seconds of decoding as the denoiser call takes."""
        self._decoding_s, self._call_s = 0.0, predicted_s

    def take(
        self,
        runnable: Collection["Request"],
        first: Callable[[list[QueueEntry]], QueueEntry],
    ) -> "Request | None":
        """Remove and return the request whose stage runs now; ``None`` if a denoiser call is due.

        Args:
            runnable: Requests that may run, parked at a stage or at a denoiser.
            first: The policy's choice of the entry that goes first.
        """
        parked = [request for request in self._parked if request in runnable]
        if not parked:
            return None
        encoding = {request.entry: request for request in parked if request.steps_left}
        if encoding:
            request = encoding[first(list(encoding))]
            self._parked.remove(request)
            return request
        request = min(parked, key=lambda request: request.entry.turn)
        # Unknown stages count as endless, so that one follows each denoiser call.
        stage_s = self._cost.predict_stage(request.call.site, request.work) or math.inf
        fits = not self._decoding_s or self._decoding_s + stage_s <= self._call_s
        if not fits and len(parked) < len(runnable):
            return None
        self._decoding_s += stage_s
        self._parked.remove(request)
        return request
