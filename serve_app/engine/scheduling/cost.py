"""What denoiser calls and whole requests cost on this device: measured, never assumed.

Knows sizes, batch sizes and seconds; no torch, no pipeline. The engine measures some sizes when it
starts, and reports what every later call really took, so that predictions follow the device.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

Size = tuple[int, int]
"""(width, height) in pixels."""

WORTHWHILE_GAIN = 1.05
"""A larger batch must make at least this many times as many pictures a second."""

_WEIGHT = 0.1
"""Of a new measurement against what was known."""

_MOST_SIZES = 256
"""Sizes of which something is known; more than can be measured at start-up."""

_RECOVERY_CALLS = 100
"""Full calls that must fit after memory ran out before one request more is tried."""


def worthwhile_batch(call_s: Mapping[int, float]) -> int:
    """The largest batch that still pays, of those measured: ``{batch size: seconds a call}``.

    From the smallest on, as long as each next one gives over 5 % more pictures a second.
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
    """What a warm-up finds for one size."""

    call_s: Mapping[int, float]
    """By batch size: seconds of a denoiser call."""
    encode_s: float
    """Of one request, before its first denoiser call."""
    decode_s: float
    """Of one request, after its last."""
    out_of_memory: bool = False
    """That is why no larger batch was measured: another time more may fit."""


@dataclass
class CostModel:
    """Predicts seconds from (size, batch size), and batch caps from what was measured."""

    max_batch_size: int
    call_s: dict[Size, dict[float, float]] = field(default_factory=dict)
    """By size, then by rows relative to one picture with guidance: seconds of a denoiser call."""
    caps: dict[Size, int] = field(default_factory=dict)
    """By measured size."""
    encode_s: dict[Size, float] = field(default_factory=dict)
    """By size: what a request costs before its first denoiser call, text encoding as a rule."""
    between_s: dict[Size, float] = field(default_factory=dict)
    """By size: what it costs between two denoiser calls, noise scheduling as a rule."""
    decode_s: dict[Size, float] = field(default_factory=dict)
    """By size: what it costs after its last denoiser call, the VAE as a rule."""
    stage_s: dict[str, dict[Size, float]] = field(default_factory=dict)
    """By site, then by size: one call of a module other than the denoiser."""
    out_of_memory: set[Size] = field(default_factory=set)
    """Those at which the warm-up measured no larger batch for want of memory."""
    calls_per_step: float = 1.0
    """Denoiser calls that one step of one request makes; two where guidance has its own."""
    _fitting: dict[Size, tuple[int, int]] = field(default_factory=dict)
    """By size where memory ran out: how many fit, and how often that many have since."""

    def measured(self, size: Size, measurement: Measurement, capped: bool = True) -> None:
        """Take over what a warm-up found; not ``capped``: with single calls, which set no cap."""
        calls = measurement.call_s
        self.call_s[size] = {float(batch): seconds for batch, seconds in calls.items()}
        if capped:
            self.caps[size] = worthwhile_batch(calls)
        self.encode_s[size] = measurement.encode_s
        self.decode_s[size] = measurement.decode_s
        if measurement.out_of_memory:
            self.out_of_memory.add(size)

    def observe_call(self, size: Size, rows: float, requests: int, seconds: float) -> None:
        """A call for ``requests`` requests, of ``rows`` together, took so long."""
        if size not in self.call_s:
            self._make_room(self.call_s)
        known = self.call_s.setdefault(size, {})
        known[rows] = _mixed(known.get(rows), seconds)
        fitting, often = self._fitting.get(size, (requests + 1, 0))
        if requests == fitting:
            enough = often + 1 == _RECOVERY_CALLS
            self._fitting[size] = (fitting + 1, 0) if enough else (fitting, often + 1)

    def observe_stage(self, site: str, size: Size, seconds: float) -> None:
        """A call of a module other than the denoiser took so long."""
        self._mix(self.stage_s.setdefault(site, {}), size, seconds)

    def observe_between(self, size: Size, seconds: float) -> None:
        """A request took so long from one denoiser call to its next."""
        self._mix(self.between_s, size, seconds)

    def observe_request(
        self, size: Size, steps: int, calls: int, encode_s: float, decode_s: float
    ) -> None:
        """A request is done."""
        self._mix(self.encode_s, size, encode_s)
        self._mix(self.decode_s, size, decode_s)
        self.calls_per_step = _mixed(self.calls_per_step, calls / max(1, steps))

    def _mix(self, known: dict[Size, float], size: Size, seconds: float) -> None:
        if size not in known:
            self._make_room(known)
        known[size] = _mixed(known.get(size), seconds)

    def _make_room(self, known: dict[Size, Any]) -> None:
        """Clients choose the sizes: the oldest that nobody measured goes when there are many."""
        if len(known) >= _MOST_SIZES:
            del known[next(size for size in known if size not in self.caps)]

    def predict_call(self, size: Size, rows: float = 1.0) -> float:
        """Seconds of one call; 0 while nothing at all is known."""
        if not self.call_s:
            return 0.0
        nearest = _nearest(size, self.call_s)
        # Rows of another size count by their pixels.
        return _interpolated(self.call_s[nearest], rows * _pixels(size) / _pixels(nearest))

    def predict_stage(self, site: str, size: Size) -> float:
        """Seconds of one call of a module other than the denoiser; 0 while none is known."""
        return _at(size, self.stage_s.get(site, {}))

    def predict_encode(self, size: Size) -> float:
        """Seconds that a request takes before its first denoiser call."""
        return self.encode_s[_nearest(size, self.encode_s)] if self.encode_s else 0.0

    def predict_decode(self, size: Size) -> float:
        """Seconds that a request takes after its last denoiser call."""
        return _at(size, self.decode_s)

    def predict_between(self, size: Size) -> float:
        """Seconds that a request takes between two of its denoiser calls."""
        return _at(size, self.between_s)

    def predict_steps(self, size: Size, steps: float, rows: float = 1.0) -> float:
        """Seconds that so many steps of a request take when it runs alone."""
        call_s = self.predict_call(size, rows) + self.predict_between(size)
        return steps * self.calls_per_step * call_s

    def cap(self, size: Size, rows: float = 1.0, within_s: float = math.inf) -> int:
        """How many requests of this size and ``rows`` are worth one call of ``within_s``."""
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
        """A batch of this many did not fit into memory: half as many, until that has gone well."""
        fitting = max(1, batch // 2)
        self._fitting[size] = (fitting, 0)
        return fitting

    def to_json(self) -> list[dict[str, Any]]:
        """What the warm-up measured; not the sizes where memory ran out, of which more may fit
        another time."""
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
        """Take over what `to_json` gave.

        Raises:
            ValueError, KeyError, TypeError: if it did not come from there.
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


def _mixed(known: float | None, new: float) -> float:
    return new if known is None else (1 - _WEIGHT) * known + _WEIGHT * new


def _pixels(size: Size) -> int:
    return size[0] * size[1]


def _at(size: Size, known: Mapping[Size, float]) -> float:
    """What is known for the nearest size, by the number of pixels; 0 while nothing is."""
    if not known:
        return 0.0
    nearest = _nearest(size, known)
    return known[nearest] * _pixels(size) / _pixels(nearest)


def _nearest(size: Size, known: Mapping[Size, object]) -> Size:
    """The known size with the closest number of pixels, by ratio."""
    if size in known:
        return size
    return min(known, key=lambda other: abs(math.log(_pixels(other) / _pixels(size))))


def _interpolated(known: Mapping[float, float], rows: float) -> float:
    """Linear between what is known, in proportion beyond it; never less for more rows."""
    if rows in known:
        return known[rows]
    points = sorted(known.items())
    (least, least_s), (most, most_s) = points[0], points[-1]
    if rows > most:
        return most_s * rows / most
    if rows < least:
        # A call has a fixed part, so fewer rows save less than their share: halfway, for want of
        # anything better.
        return least_s * (1 + rows / least) / 2
    for (low, low_s), (high, high_s) in pairwise(points):
        if low <= rows <= high:
            return low_s + (high_s - low_s) * (rows - low) / (high - low)
    raise AssertionError("rows lie between the ends")
