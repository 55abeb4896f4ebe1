"""Costs of denoiser calls and whole requests on this device: measured, never assumed.

The engine measures some sizes at start-up and reports the duration of every later call, so
predictions follow the device. This module knows sizes, batch sizes and seconds; no torch, no
pipeline. Solo seconds are defined in `serve_app.protocol.load`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from serve_app.engine.scheduling.batch_costs import BatchCosts

Size = tuple[int, int]
"""(width, height) in pixels."""

WORTHWHILE_GAIN = 1.05
"""A larger batch must generate at least this many times as many images per second."""

_WEIGHT = 0.1
"""Weight of a new measurement in a smoothed time."""

_OWN_WEIGHT = 0.02
"""Weight of a new measurement in what tells a batch size from the others of its size."""

_MOST_CHANGE = 2.0
"""A call that takes more times as long as predicted, or as few, counts as this much."""

_MOST_SIZES = 256
"""Limit of known sizes; more than a start-up can measure."""

_RECOVERY_CALLS = 100
"""Full calls that must fit after memory ran out, before the cap grows by one."""

_REFRESH_CALLS = 16
"""Calls of a size after which its batch costs are computed anew."""

_FORGET_CALLS = 512
"""Calls of a size after which a batch that gains nothing is forgotten, if it did not run again."""


def worthwhile_batch(call_s: Mapping[int, float]) -> int:
    """Return the largest worthwhile batch size of ``{batch size: seconds per call}``.

    Starts from the smallest, and stops where the next one gains at most 5 % more images per second.
    """
    sizes = sorted(call_s)
    best = sizes[0]
    for smaller, larger in pairwise(sizes):
        gain = (larger / call_s[larger]) / (smaller / call_s[smaller])
        if gain <= WORTHWHILE_GAIN:
            break
        best = larger
    return best


@dataclass(frozen=True)
class Measurement:
    """Costs of one size, measured by the warm-up."""

    call_s: Mapping[int, float]
    """Seconds of a denoiser call, by batch size."""
    encode_s: float
    """Seconds of one request before its first denoiser call."""
    decode_s: float
    """Seconds of one request after its last denoiser call."""
    out_of_memory: bool = False
    """True if memory ran out for a larger batch; it may fit another time."""


@dataclass
class CostModel:
    """Predictor of seconds and batch caps, by size and batch size, from measurements."""

    max_batch_size: int
    call_s: dict[Size, dict[float, float]] = field(default_factory=dict)
    """Seconds of a denoiser call, by size, then by rows relative to one image with guidance."""
    caps: dict[Size, int] = field(default_factory=dict)
    """Worthwhile batch sizes, by measured size."""
    encode_s: dict[Size, float] = field(default_factory=dict)
    """Seconds before the first denoiser call, usually text encoding; by size."""
    between_s: dict[Size, float] = field(default_factory=dict)
    """Seconds between two denoiser calls, usually noise scheduling; by size."""
    decode_s: dict[Size, float] = field(default_factory=dict)
    """Seconds after the last denoiser call, usually the VAE; by size."""
    stage_s: dict[str, dict[Size, float]] = field(default_factory=dict)
    """Seconds of one call of a module other than the denoiser; by site, then by size."""
    out_of_memory: set[Size] = field(default_factory=set)
    """Sizes at which memory ended the measurement of larger batches."""
    calls_per_step: float = 1.0
    """Denoiser calls per step of one request; two if guidance has a call of its own."""
    _fitting: dict[Size, tuple[int, int]] = field(default_factory=dict)
    """Requests that fit, and full calls since; by size at which memory ran out."""
    _calls: dict[Size, int] = field(default_factory=dict)
    """Calls of each size that were observed."""
    _seen: dict[Size, dict[float, int]] = field(default_factory=dict)
    """The last such call, by size and rows."""
    _batches: dict[tuple[Size, float], BatchCosts] = field(default_factory=dict)
    """Batch costs by size and rows."""

    def measured(self, size: Size, measurement: Measurement, capped: bool = True) -> None:
        """Add the measurement of ``size``. Without ``capped`` it sets no cap: single calls only."""
        calls = measurement.call_s
        self.call_s[size] = {float(batch): seconds for batch, seconds in calls.items()}
        if capped:
            self.caps[size] = worthwhile_batch(calls)
        self.encode_s[size] = measurement.encode_s
        self.decode_s[size] = measurement.decode_s
        if measurement.out_of_memory:
            self.out_of_memory.add(size)
        self._batches.clear()

    def observe_call(self, size: Size, rows: float, requests: int, seconds: float) -> None:
        """Add the duration of a call for ``requests`` requests with ``rows`` rows in all."""
        if size not in self.call_s:
            self._make_room(self.call_s)
        known = self.call_s.setdefault(size, {})
        if not self._is_new(size, known, rows):
            _learn(known, rows, seconds)
        fitting, often = self._fitting.get(size, (requests + 1, 0))
        if requests == fitting:
            enough = often + 1 == _RECOVERY_CALLS
            self._fitting[size] = (fitting + 1, 0) if enough else (fitting, often + 1)

    def _is_new(self, size: Size, known: dict[float, float], rows: float) -> bool:
        """Count a call; ``True`` if it is the first of its batch size, which teaches nothing.

        It also pays for memory and for the choice of kernels. Batches that gain nothing are
        forgotten, if they did not run for long: a policy avoids them, so slow calls would rule
        them out for ever.
        """
        if size not in self._calls:
            self._make_room(self._calls)
            self._seen = {other: seen for other, seen in self._seen.items() if other in self._calls}
        count = self._calls[size] = self._calls.get(size, 0) + 1
        seen = self._seen.setdefault(size, {})
        first = bool(known) and rows not in known and rows not in seen
        if rows not in known or not count % _REFRESH_CALLS:
            self._forget_batches(size)
        seen[rows] = count
        if not count % _REFRESH_CALLS:
            for old in [old for old in known if seen.get(old, 0) < count - _FORGET_CALLS]:
                smaller = [known[other] / other for other in known if other < old]
                if smaller and known[old] / old > min(smaller):
                    del known[old]
                    seen.pop(old, None)
        return first

    def _forget_batches(self, size: Size) -> None:
        for key in [key for key in self._batches if key[0] == size]:
            del self._batches[key]

    def observe_stage(self, site: str, size: Size, seconds: float) -> None:
        """Add the duration of a call of a module other than the denoiser."""
        self._mix(self.stage_s.setdefault(site, {}), size, seconds)

    def observe_between(self, size: Size, seconds: float) -> None:
        """Add the time of a request from one denoiser call to its next."""
        self._mix(self.between_s, size, seconds)

    def observe_request(
        self, size: Size, steps: int, calls: int, encode_s: float, decode_s: float
    ) -> None:
        """Add the times and the calls of a finished request."""
        self._mix(self.encode_s, size, encode_s)
        self._mix(self.decode_s, size, decode_s)
        self.calls_per_step = _mixed(self.calls_per_step, calls / max(1, steps))

    def _mix(self, known: dict[Size, float], size: Size, seconds: float) -> None:
        if size not in known:
            self._make_room(known)
        known[size] = _mixed(known.get(size), seconds)

    def _make_room(self, known: dict[Size, Any]) -> None:
        """Evict the oldest size without a cap if there are too many: clients choose the sizes."""
        if len(known) >= _MOST_SIZES:
            del known[next(size for size in known if size not in self.caps)]

    def predict_call(self, size: Size, rows: float = 1.0) -> float:
        """Return the seconds of one denoiser call; 0 while nothing is known."""
        if not self.call_s:
            return 0.0
        nearest = _nearest(size, self.call_s)
        # Rows of another size count by their pixels.
        return _interpolated(self.call_s[nearest], rows * _pixels(size) / _pixels(nearest))

    def predict_stage(self, site: str, size: Size) -> float:
        """Return the seconds of one call at ``site``, not a denoiser; 0 while unknown."""
        return _at(size, self.stage_s.get(site, {}))

    def predict_encode(self, size: Size) -> float:
        """Return the seconds of a request before its first denoiser call."""
        return self.encode_s[_nearest(size, self.encode_s)] if self.encode_s else 0.0

    def predict_decode(self, size: Size) -> float:
        """Return the seconds of a request after its last denoiser call."""
        return _at(size, self.decode_s)

    def predict_between(self, size: Size) -> float:
        """Return the seconds of a request between two of its denoiser calls."""
        return _at(size, self.between_s)

    def predict_steps(self, size: Size, steps: float, rows: float = 1.0) -> float:
        """Return the solo seconds of ``steps`` steps of a request."""
        return self.predict_calls(size, steps * self.calls_per_step, rows)

    def predict_calls(self, size: Size, calls: float, rows: float = 1.0) -> float:
        """Return the solo seconds of ``calls`` denoiser calls of a request."""
        return calls * (self.predict_call(size, rows) + self.predict_between(size))

    def batches(self, size: Size, rows: float = 1.0) -> BatchCosts:
        """Return the costs of calls for 1, 2, 3… requests of this size and ``rows``."""
        if (costs := self._batches.get((size, rows))) is not None:
            return costs
        if len(self._batches) >= 2 * _MOST_SIZES:
            self._batches.clear()
        between_s = self.predict_between(size)
        counts = range(1, self.cap(size, rows) + 1)
        call_s = [self.predict_call(size, n * rows) + n * between_s for n in counts]
        costs = self._batches[size, rows] = BatchCosts(call_s, self._known(size) / rows)
        return costs

    def _known(self, size: Size) -> float:
        """Return the most rows of a measured call, of this size or the nearest measured one."""
        if not self.call_s:
            return 0.0
        nearest = _nearest(size, self.call_s)
        return max(self.call_s[nearest]) * _pixels(nearest) / _pixels(size)

    def cap(self, size: Size, rows: float = 1.0, within_s: float = math.inf) -> int:
        """Return the batch cap for requests of this size and ``rows``, in calls of ``within_s``."""
        most = self.max_batch_size
        if self.caps:
            nearest = _nearest(size, self.caps)
            scaled = self.caps[nearest] * _pixels(nearest) / _pixels(size)
            most = max(1, min(most, math.floor(scaled)))
        if size in self._fitting:
            most = min(most, self._fitting[size][0])
        while most > 1 and self.predict_call(size, most * rows) > within_s:
            most -= 1
        return most

    def lower_cap(self, size: Size, batch: int) -> int:
        """Halve the cap after a batch of this many ran out of memory; return the new cap.

        The cap grows again, by one request at a time, once enough full calls have fit.
        """
        fitting = max(1, batch // 2)
        if size in self._fitting:
            fitting = min(fitting, self._fitting[size][0])
        self._fitting[size] = (fitting, 0)
        self._batches.clear()
        return fitting

    def to_json(self) -> list[dict[str, Any]]:
        """Return the measurements of the warm-up.

        Leaves out sizes at which memory ran out: a larger batch may fit another time.
        """
        return [
            {
                "size": size,
                "cap": self.caps.get(size),
                "call_s": sorted(self.call_s[size].items()),
                "encode_s": encode_s,
                "decode_s": self.decode_s[size],
            }
            for size, encode_s in self.encode_s.items()
            if size not in self.out_of_memory
        ]

    def add_json(self, entries: list[dict[str, Any]]) -> None:
        """Add the result of `to_json`.

        Raises:
            ValueError, KeyError, TypeError: ``entries`` is not such a result.
        """
        for entry in entries:
            width, height = entry["size"]
            call_s = {float(rows): float(seconds) for rows, seconds in entry["call_s"]}
            if not call_s:
                raise ValueError("a size without a call")
            self.call_s[width, height] = call_s
            self.encode_s[width, height] = float(entry["encode_s"])
            self.decode_s[width, height] = float(entry["decode_s"])
            if entry["cap"] is not None:
                self.caps[width, height] = int(entry["cap"])


def _learn(known: dict[float, float], rows: float, seconds: float) -> None:
    """Add a call to the times of one size, by rows.

    A device that gets slower slows batches of all sizes. If only those that run became slower, the
    others would look like the better ones. So a call changes all times by the same factor, and only
    slowly the ratios between them, which decide what a batch gains.
    """
    if before := known.get(rows):
        change = min(_MOST_CHANGE, max(1 / _MOST_CHANGE, seconds / before))
        for other in known:
            known[other] *= _mixed(1.0, change)
    known[rows] = _mixed(known.get(rows), seconds, _OWN_WEIGHT)


def _mixed(known: float | None, new: float, weight: float = _WEIGHT) -> float:
    return new if known is None else (1 - weight) * known + weight * new


def _pixels(size: Size) -> int:
    return size[0] * size[1]


def _at(size: Size, known: Mapping[Size, float]) -> float:
    """Scale the value of the nearest size by the number of pixels; 0 while nothing is known."""
    if not known:
        return 0.0
    nearest = _nearest(size, known)
    return known[nearest] * _pixels(size) / _pixels(nearest)


def _nearest(size: Size, known: Mapping[Size, object]) -> Size:
    """Return the known size with the closest number of pixels, by ratio."""
    if size in known:
        return size
    return min(known, key=lambda other: abs(math.log(_pixels(other) / _pixels(size))))


def _interpolated(known: Mapping[float, float], rows: float) -> float:
    """Interpolate linearly, and extrapolate in proportion; never less for more rows."""
    if rows in known:
        return known[rows]
    points = sorted(known.items())
    (least, least_s), (most, most_s) = points[0], points[-1]
    if rows > most:
        return most_s * rows / most
    if rows < least:
        # A call has a fixed part, so fewer rows save less than their share. Half of it is a guess.
        return least_s * (1 + rows / least) / 2
    for (low, low_s), (high, high_s) in pairwise(points):
        if low <= rows <= high:
            return low_s + (high_s - low_s) * (rows - low) / (high - low)
    raise AssertionError("rows lie between the ends")
