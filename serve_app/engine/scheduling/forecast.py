"""Forecast of completion times, by simulation of the engine's next calls. Pure Python."""

import math
import statistics
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from serve_app.engine.scheduling.cost import CostModel, Size

_WEIGHT = 0.05
"""Weight of the last request in the smoothed bias of the forecast."""

_LEAST, _MOST = 0.5, 4.0
"""Bounds of the bias. A value beyond them means a fault that no factor corrects."""


@dataclass(eq=False)
class Work:
    """Remaining work of a request."""

    group: Hashable
    """Merge group: requests of equal groups may share denoiser calls."""
    size: Size
    rows: float
    """Rows of each of its calls, relative to one image with guidance."""
    calls: float
    """Remaining denoiser calls."""
    encode_s: float
    decode_s: float


class Forecast:
    """Predictor of completion times that corrects its bias from observed ones."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._log_bias = 0.0
        self._errors: deque[float] = deque(maxlen=256)

    def predict_s(self, order: Sequence[Work], target: Work) -> float:
        """Return the seconds until ``target`` is done. Consumes every item of ``order``.

        ``order`` holds the remaining work of all requests, the first to run first. The simulation
        has no new arrivals; the observed bias makes up for their average cost.

        Raises:
            ValueError: ``target`` is not in ``order``.
        """
        for work, ended_s in self._simulate(order):
            if work is target:
                return ended_s * math.exp(self._log_bias)
        raise ValueError("the request is not among those in order")

    def predict_all_s(self, order: Sequence[Work]) -> list[float]:
        """Return the seconds until each is done, like `predict_s`. Consumes every item."""
        ended = {id(work): ended_s for work, ended_s in self._simulate(order)}
        return [ended[id(work)] * math.exp(self._log_bias) for work in order]

    def observe(self, predicted_s: float, actual_s: float) -> float | None:
        """Learn from a finished request; return the error as a share of ``actual_s``.

        Returns ``None`` if nothing was known at the time of the prediction.
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
        """Median error of the last 256 requests, as a share of the actual time, if any."""
        return statistics.median(self._errors) if self._errors else None

    def _simulate(self, order: Sequence[Work]) -> Iterator[tuple[Work, float]]:
        """Yield each request as it ends, with the seconds until then."""
        cost = self._cost
        now = sum(work.encode_s for work in order)
        groups: dict[Hashable, list[Work]] = {}
        rank = {id(work): index for index, work in enumerate(order)}
        for work in order:
            groups.setdefault(work.group, []).append(work)
        batches = {key: cost.batches(left[0].size, left[0].rows) for key, left in groups.items()}
        while groups:
            key = min(groups, key=lambda key: rank[id(groups[key][0])])
            left = groups[key]
            batch = left[: batches[key].size(len(left))]
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
