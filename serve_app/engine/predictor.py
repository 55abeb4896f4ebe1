"""Predictions for requests: the work that remains, and the time at which each one completes.

Joins the cost model and the forecast, which know only sizes and seconds, to the engine's requests.
Torch-free.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from serve_app.engine.metrics import EngineMetrics
from serve_app.engine.scheduling.call_counts import CallCounts, Kind
from serve_app.engine.scheduling.cost import CostModel, Size
from serve_app.engine.scheduling.forecast import Forecast, Work

if TYPE_CHECKING:  # a request holds tensors
    from serve_app.engine.request import Request


class Predictor:
    """Predicts from measured costs, and learns from completed requests."""

    batched: bool = True
    """True if requests share denoiser calls. The engine sets it after the certification."""

    def __init__(self, cost: CostModel, metrics: EngineMetrics) -> None:
        self._cost = cost
        self._metrics = metrics
        self._forecast = Forecast(cost)
        self._call_counts = CallCounts()

    @property
    def error(self) -> float | None:
        """Median relative error of the recent predictions; ``None`` before the first."""
        return self._forecast.error

    def remaining_s(self, request: "Request") -> float:
        """Predict the work that remains, in solo seconds."""
        cost, size = self._cost, request.work
        decode_s = cost.predict_decode(size)
        if request.calls and not request.steps_left:
            return max(0.0, decode_s - request.non_denoiser_s)
        steps_s = cost.predict_calls(size, self.calls_left(request), request.rows)
        if request.calls:
            return steps_s + decode_s
        return max(0.0, cost.predict_encode(size) - request.encode_s) + steps_s + decode_s

    def calls_left(self, request: "Request") -> float:
        """Predict the denoiser calls that the request will still make."""
        per_step = self._cost.calls_per_step
        left = request.steps_left * per_step
        if request.params.acceleration == "none" or not left:
            return left
        all_calls = (request.steps_done + request.steps_left) * per_step
        made = all_calls * self._call_counts.share(_kind(request))
        return min(left, max(made - request.calls, per_step))  # those of the last step are made

    def step_s(self, request: "Request") -> float:
        """Predict the seconds of its parked denoiser call, alone on the device."""
        return self._cost.predict_call(request.work, request.rows)

    def completion_s(self, order: Sequence["Request"]) -> list[float]:
        """Predict the seconds until each request completes, if they run in this order."""
        return self._forecast.predict_all_s([self._work(request) for request in order])

    def completion_of_s(self, request: "Request", order: Sequence["Request"]) -> float:
        """Predict the seconds until one request of ``order`` completes, at less cost than all."""
        works = [self._work(other) for other in order]
        return self._forecast.predict_s(works, works[order.index(request)])

    def _work(self, request: "Request") -> Work:
        cost, size = self._cost, request.work
        return Work(
            group=(size, request.params.lora) if self.batched else request.number,
            size=size,
            rows=request.rows,
            calls=self.calls_left(request),
            encode_s=0.0 if request.calls else cost.predict_encode(size),
            decode_s=cost.predict_decode(size),
        )

    def observe_between(self, size: Size, seconds: float) -> None:
        """Learn how long a request takes between two of its denoiser calls."""
        self._cost.observe_between(size, seconds)

    def learn_from(self, request: "Request", took_s: float) -> None:
        """Improve later predictions by a request that completed ``took_s`` after its admission."""
        self._cost.observe_request(
            request.work,
            request.steps_done,
            request.calls + request.extrapolated,
            request.encode_s,
            request.non_denoiser_s,
        )
        if request.params.acceleration != "none":
            self._call_counts.observe(_kind(request), request.calls, request.extrapolated)
        if request.entry.low_priority:
            return  # the others decided when it ended
        error = self._forecast.observe(request.predicted_s, took_s)
        if error is not None:
            self._metrics.forecast_off(error)


def _kind(request: "Request") -> Kind:
    """Return what the share of calls depends on that a request makes."""
    params = request.params
    return (params.acceleration, params.noise_scheduler), params.steps_to_run
