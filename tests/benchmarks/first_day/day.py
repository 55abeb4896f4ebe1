"""What a section gets: the device, the time that is left, and the place for its rows."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.benchmarks.first_day.results import Results


class OutOfTime(Exception):
    """The rest of a section does not fit into the time that is left."""


class NoAnswer(Exception):
    """The engine has been silent for so long that its device must be stuck."""


@dataclass
class Day:
    """The run of one section after another.

    Attributes:
        section: name of the section that runs.
    """

    results: Results
    device: torch.device
    rehearsal: bool
    until: float
    """End of the call, by `time.time`."""
    section: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the models: a CPU rehearses in float32, which it is made for."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def left_s(self) -> float:
        return self.until - time.time()

    def row(self, row: str, measure: Callable[[], dict[str, Any]], estimate_s: float = 0.0) -> None:
        """Measure a row unless an earlier call did, and write it.

        Raises:
            OutOfTime: the estimate exceeds the time that is left.
        """
        if self.results.has(self.section, row):
            return
        if estimate_s > self.left_s:
            raise OutOfTime(f"{row} needs about {estimate_s:.0f} s, {self.left_s:.0f} s are left")
        self.results.add(self.section, row, measure())


def aim(text: str, met: bool) -> dict[str, Any]:
    """Return the columns of a target and of the verdict about it."""
    return {"aim": text, "met": met}
