"""Waiting for something to become true: polling with a deadline, never a bare sleep."""

import threading
from collections.abc import Callable
from time import monotonic
from typing import TypeVar

T = TypeVar("T")


def wait_until(
    probe: Callable[[], T], deadline_s: float = 30.0, every_s: float = 0.02, what: str = ""
) -> T:
    """The first true value that ``probe`` returns; fails the test when none comes in time."""
    pause = threading.Event()
    ends_at = monotonic() + deadline_s
    while not (value := probe()):
        if monotonic() > ends_at:
            raise AssertionError(
                f"waited {deadline_s} s in vain for {what or probe}; got {value!r}"
            )
        pause.wait(every_s)
    return value
