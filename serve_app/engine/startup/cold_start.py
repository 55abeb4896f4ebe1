"""Duration of a start, phase by phase: a metric for each, and one line in the log."""

import logging
import time
from typing import Literal, get_args

from serve_app.engine.timer import wait_for_device
from serve_app.metrics.engine import COLD_START

logger = logging.getLogger(__name__)

Phase = Literal["load", "certify", "preview", "schedulers", "measure", "compile"]
"""Phases of a start, in order.

- ``load``: read the weights.
- ``certify``: certify how requests share the pipeline, or check the profile's certificate.
- ``preview``: fit the previews.
- ``schedulers``: try the noise schedulers.
- ``measure``: measure the sizes of the config.
- ``compile``: compile for these sizes.
"""


class ColdStart:
    """Stopwatch with laps that starts at its creation; the phases add up to the total."""

    def __init__(self) -> None:
        self.phases_s: dict[Phase, float] = dict.fromkeys(get_args(Phase), 0.0)
        self.reuse = ""
        """Description of the results reused from an earlier start. Set by the warm-up."""
        self._lap_at = time.perf_counter()

    def ended(self, phase: Phase) -> None:
        """Count the time since the last call as ``phase``; waits for the device."""
        wait_for_device()
        now = time.perf_counter()
        self.phases_s[phase] += now - self._lap_at
        self._lap_at = now

    @property
    def total_s(self) -> float:
        """Seconds from the creation to the end of the last phase."""
        return sum(self.phases_s.values())

    def report(self, model: str) -> None:
        """Report the phases to the log and the metrics."""
        for phase, seconds in self.phases_s.items():
            COLD_START.labels(model, phase).set(seconds)
        phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in self.phases_s.items())
        logger.info("model %s: ready after %.2f s: %s; %s", model, self.total_s, phases, self.reuse)
