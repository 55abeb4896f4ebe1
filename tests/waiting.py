"""Wait for a condition: poll it with a deadline, without a fixed sleep."""

import threading
from collections.abc import Callable
from time import monotonic
from typing import TypeVar

T = TypeVar("T")


def wait_until(
    probe: Callable[[], T], deadline_s: float = 30.0, every_s: float = 0.02, what: str = ""
) -> T:
    """Return the first true value of ``probe``; raise AssertionError after the deadline."""
    pause = threading.Event()
    ends_at = monotonic() + deadline_s
    while not (value := probe()):
        if monotonic() > ends_at:
            raise AssertionError(
                f"waited {deadline_s} s for {what or probe}; the last value is {value!r}"
            )
        pause.wait(every_s)
    return value
