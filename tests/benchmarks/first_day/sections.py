"""The sections of a first day in their order, with the time that each is given."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.benchmarks.first_day.day import Day
from tests.benchmarks.first_day.environment import ceilings, environment
from tests.benchmarks.first_day.gpu_tests import gpu_tests
from tests.benchmarks.first_day.host import host
from tests.benchmarks.first_day.images import images
from tests.benchmarks.first_day.options import option
from tests.benchmarks.first_day.start import start
from tests.benchmarks.first_day.steps import steps
from tests.benchmarks.first_day.subject import Subjects, Target

SD15 = Target("sd15", 512, (1, 2, 4, 8, 16), (1, 2, 4, 8, 16), 20, alone=16, efficiency_steps=4)
SDXL = Target("sdxl", 512, (1, 2, 4, 8, 16), (1, 4, 16), 20, alone=8, efficiency_steps=4)
SDXL_LARGE = Target("sdxl", 1024, (1, 2, 4, 8), (1, 4, 16), 25, alone=4, efficiency_steps=25)
FLUX = Target("flux", 1024, (1, 2, 4), (1, 4), 10, alone=2, efficiency_steps=4)

PARTS: tuple[tuple[str, Callable[[Day, Subjects, Target], None], float], ...] = (
    ("start", start, 1.0),
    ("steps", steps, 0.5),
    ("images", images, 1.0),
    ("host", host, 0.3),
)
"""Parts of a target, with their share of its time."""

TARGETS = ((SD15, 30.0), (SDXL, 40.0), (SDXL_LARGE, 70.0), (FLUX, 70.0))
"""Targets with guessed seconds of one part. A part that does not fit is left for another call."""

REHEARSED_S = 3.0
"""Guessed seconds of a section in a rehearsal."""


@dataclass(frozen=True)
class Section:
    """One section: it may fail, or be skipped, without the others."""

    name: str
    run: Callable[[Day, Subjects], None]
    estimate_s: float
    """Seconds that must be left for it to begin."""
    rehearsed_s: float = REHEARSED_S
    """The same in a rehearsal."""


def sections() -> Iterator[Section]:
    """Yield all sections in their order."""
    yield Section("environment", lambda day, _: environment(day), 5.0)
    yield Section("ceilings", lambda day, _: ceilings(day), 5.0)
    for target, estimate_s in TARGETS:
        for name, run, share in PARTS:
            yield Section(f"{target.name}: {name}", _of(run, target), share * estimate_s)
    yield Section("compile", _with_option("compile"), 120.0, rehearsed_s=150.0)
    yield Section("CUDA graphs", _with_option("cuda_graphs"), 40.0)
    yield Section("tests/gpu", _tests, 30.0, rehearsed_s=10.0)


def _of(
    run: Callable[[Day, Subjects, Target], None], target: Target
) -> Callable[[Day, Subjects], None]:
    return lambda day, subjects: run(day, subjects, target)


def _with_option(name: str) -> Callable[[Day, Subjects], None]:
    return lambda day, subjects: option(day, subjects, SD15, {name: True})


def _tests(day: Day, subjects: Subjects) -> None:
    subjects.release()
    gpu_tests(day)
