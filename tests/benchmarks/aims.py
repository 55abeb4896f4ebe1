"""Targets on an H200 in bfloat16, and the verdict of a run about each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tests.benchmarks.saturation import Saturated

WAITING = 16

SPEEDUPS = {
    ("sd15", 512, 20): 2.5,
    ("sdxl", 512, 20): 1.7,
    ("sd15", 1024, 25): 1.1,
    ("sdxl", 1024, 25): 1.1,
}
"""Least images per second over those of one at a time, by model, side and steps."""

EFFICIENCIES = {("sdxl", 1024, 25): 0.95, ("sd15", 512, 4): 0.85}
"""Least efficiency by model, side and steps."""

LOAD = 0.9
"""Share of the capacity at which deadlines are compared."""

IN_TIME = 0.85
IN_TIME_GAIN = 0.40
"""Least share of requests in time, and its least lead over both stock ways."""

STOCK_WAYS = ("one at a time", "whole batches")
OUR_WAY = "engine, on_time"


class Row(Protocol):
    """The columns of the result table that targets use."""

    @property
    def load(self) -> float: ...
    @property
    def way(self) -> str: ...
    @property
    def slo(self) -> float: ...


@dataclass(frozen=True)
class Aim:
    """One target; ``measured`` is None if the run did not measure it."""

    text: str
    measured: float | None
    met: bool

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        return f"{'met' if self.met else 'missed'}: {self.measured:.3g}"


def _at_least(text: str, least: float, measured: float | None) -> Aim:
    return Aim(text, measured, measured is not None and measured >= least)


def aims(model: str, rows: Sequence[Row], saturated: Sequence[Saturated]) -> list[Aim]:
    """Return all targets, including those of other models and loads."""
    found = {
        (model, row.width, row.steps): row
        for row in saturated
        if row.width == row.height and row.waiting == WAITING
    }
    in_time = {row.way: row.slo for row in rows if row.load == LOAD}
    ours = in_time.get(OUR_WAY)
    stock = [in_time[way] for way in STOCK_WAYS if way in in_time]
    gain = None if ours is None or len(stock) < len(STOCK_WAYS) else ours - max(stock)
    return [
        *(
            _at_least(
                f"{name} at {side}x{side}, {WAITING} waiting: {least:g} times one at a time",
                least,
                found[name, side, steps].speedup if (name, side, steps) in found else None,
            )
            for (name, side, steps), least in SPEEDUPS.items()
        ),
        *(
            _at_least(
                f"{name} at {side}x{side}, {steps} steps: efficiency {least:g}",
                least,
                found[name, side, steps].efficiency if (name, side, steps) in found else None,
            )
            for (name, side, steps), least in EFFICIENCIES.items()
        ),
        _at_least(f"at {LOAD:g} of capacity, {IN_TIME:.0%} in time", IN_TIME, ours),
        _at_least(
            f"at {LOAD:g} of capacity, {100 * IN_TIME_GAIN:.0f} points above both stock ways",
            IN_TIME_GAIN,
            gain,
        ),
    ]
