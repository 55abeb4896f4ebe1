"""Wait for a condition: poll it with a deadline, without a fixed sleep."""

import threading
from collections.abc import Callable
from time import monotonic
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 4
"""How much longer than named a test waits: a busy machine is slower, and only a failure waits so
long."""


def wait_until(
    probe: Callable[[], T], deadline_s: float = 30.0, every_s: float = 0.02, what: str = ""
) -> T:
    """Return the first true value of ``probe``; raise AssertionError after the deadline.

    ``deadline_s`` is enough on a machine that does nothing else; `PATIENCE` times that is waited.
    """
    pause = threading.Event()
    deadline_s *= PATIENCE
    ends_at = monotonic() + deadline_s
    while not (value := probe()):
        if monotonic() > ends_at:
            raise AssertionError(
                f"waited {deadline_s} s for {what or probe}; the last value is {value!r}"
            )
        pause.wait(every_s)
    return value
