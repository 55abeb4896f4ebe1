"""When requests will be done: what the engine is going to do, played forward. Pure Python."""

import math
import statistics
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from serve_app.engine.cost import CostModel, Size

_WEIGHT = 0.05
"""Of the last request against all before, in what the forecast has lately been off by."""

_LEAST, _MOST = 0.5, 4.0
"""Bounds of that: beyond them something is wrong that no factor mends."""


@dataclass(eq=False)
class Work:
    """What is left of a request."""

    group: Hashable
    """Those with equal groups may share denoiser calls."""
    size: Size
    rows: float
    """Of each of its calls, relative to one picture with guidance."""
    calls: float
    """Of the denoiser."""
    encode_s: float
    decode_s: float


class Forecast:
    """Predicts, and learns from how it was."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._log_bias = 0.0
        self._errors: deque[float] = deque(maxlen=256)

    def predict_s(self, order: Sequence[Work], target: Work) -> float:
        """Seconds until ``target``, one of ``order``, is done; uses up what is left of all.

        ``order`` says who goes before whom. Nobody comes in between in this play, and requests do
        come: what that costs on average is known from the last ones.
        """
        return self._play_s(order, target) * math.exp(self._log_bias)

    def observe(self, predicted_s: float, actual_s: float) -> float | None:
        """A request is done, ``actual_s`` after the prediction: the error as a share of that.

        None if there was nothing to predict from.
        """
        if predicted_s <= 0 or actual_s <= 0:
            return None
        error = abs(predicted_s - actual_s) / actual_s
        self._errors.append(error)
        bias = self._log_bias + _WEIGHT * math.log(actual_s / predicted_s)
        self._log_bias = min(math.log(_MOST), max(math.log(_LEAST), bias))
        return error

    @property
    def error(self) -> float | None:
        """Median of the last few hundred, as a share of the time it took; none before the first."""
        return statistics.median(self._errors) if self._errors else None

    def _play_s(self, order: Sequence[Work], target: Work) -> float:
        cost = self._cost
        now = sum(work.encode_s for work in order)
        left = list(order)
        while left:
            leader = left[0]
            cap = cost.cap(leader.size, leader.rows)
            batch = [work for work in left if work.group == leader.group][:cap]
            rows = sum(work.rows for work in batch)
            call_s = cost.predict_call(leader.size, rows)
            call_s += len(batch) * cost.predict_between(leader.size)
            calls = min(work.calls for work in batch)
            now += calls * call_s
            for work in batch:
                work.calls -= calls
                if work.calls <= 0:
                    now += work.decode_s
                    if work is target:
                        return now
                    left.remove(work)
        raise ValueError("the request is not among those in order")
