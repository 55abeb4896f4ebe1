"""How long a start takes, phase by phase: a metric for each, and one line in the log."""

import logging
import time
from typing import Literal, get_args

from serve_app.engine.timer import wait_for_device
from serve_app.metrics.engine import COLD_START

logger = logging.getLogger(__name__)

Phase = Literal["load", "certify", "preview", "measure", "compile"]
"""Reading the weights; finding out how requests share the pipeline, or that it is known; fitting
previews; measuring the sizes of the config; compiling for them."""


class ColdStart:
    """A stopwatch with laps, running from its making: the phases add up to the whole."""

    def __init__(self) -> None:
        self.phases_s: dict[Phase, float] = dict.fromkeys(get_args(Phase), 0.0)
        self.reuse = ""
        """What of an earlier start was taken over, in words. Set by the warm-up."""
        self._lap_at = time.perf_counter()

    def ended(self, phase: Phase) -> None:
        """What was done since the last one, on the device too, was of this phase."""
        wait_for_device()
        now = time.perf_counter()
        self.phases_s[phase] += now - self._lap_at
        self._lap_at = now

    @property
    def total_s(self) -> float:
        """Seconds from the beginning to the end of the last phase."""
        return sum(self.phases_s.values())

    def report(self, model: str) -> None:
        """For the log and the metrics."""
        for phase, seconds in self.phases_s.items():
            COLD_START.labels(model, phase).set(seconds)
        phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in self.phases_s.items())
        logger.info("model %s: ready after %.2f s: %s; %s", model, self.total_s, phases, self.reuse)
