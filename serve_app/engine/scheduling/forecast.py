"""When requests will be done: what the engine is going to do, played forward. Pure Python."""

import math
import statistics
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from serve_app.engine.scheduling.cost import CostModel, Size

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
        for work, ended_s in self._play(order):
            if work is target:
                return ended_s * math.exp(self._log_bias)
        raise ValueError("the request is not among those in order")

    def predict_all_s(self, order: Sequence[Work]) -> list[float]:
        """Seconds until each is done, as `predict_s` has it; uses up what is left of all."""
        ended = {id(work): ended_s for work, ended_s in self._play(order)}
        return [ended[id(work)] * math.exp(self._log_bias) for work in order]

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

    def _play(self, order: Sequence[Work]) -> Iterator[tuple[Work, float]]:
        """Who is done, and after how many seconds, one after the other."""
        cost = self._cost
        now = sum(work.encode_s for work in order)
        groups: dict[Hashable, list[Work]] = {}
        place = {id(work): index for index, work in enumerate(order)}
        for work in order:
            groups.setdefault(work.group, []).append(work)
        caps = {key: cost.cap(left[0].size, left[0].rows) for key, left in groups.items()}
        while groups:
            key = min(groups, key=lambda key: place[id(groups[key][0])])
            left = groups[key]
            batch = left[: caps[key]]
            rows = sum(work.rows for work in batch)
            call_s = cost.predict_call(batch[0].size, rows)
            call_s += len(batch) * cost.predict_between(batch[0].size)
            calls = min(work.calls for work in batch)
            now += calls * call_s
            staying = []
            for work in batch:
                work.calls -= calls
                if work.calls > 0:
                    staying.append(work)
                else:
                    now += work.decode_s
                    yield work, now
            left[: len(batch)] = staying
            if not left:
                del groups[key]
